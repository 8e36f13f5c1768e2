"""Runs that are killed or interrupted in the middle, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr

ROOT = Path(__file__).parents[2]
DEMO = """
import sys, torch
from pathlib import Path
from hesscope.study.demo import DemoSettings, run_demo
torch.set_num_threads(1)
settings = DemoSettings(width=4, epochs=4, theory_classes=(3, 10), sweep_classes=(3, 6))
run_demo(Path(sys.argv[1]), settings, lambda title, share: None)
"""
SWEEP = ["sweep", "--classes", "3,5,8", "--inputs", "60", "--samples", "120", "--width", "4", "--rtol", "0.2"]
STUDY = """
model = "tests.study.user_code:network"
model_arguments = { width = 40 }
data = "tests.study.user_code:points"
data_arguments = { N = 700 }
method = "probes"
probes = 60
output = "out"
"""


def start(command, **options):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **options)


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def results(folder):
    return {path.name: xr.load_dataset(path) for path in sorted(folder.glob("results-*.nc"))}


def assert_same(one, other):
    assert set(one) == set(other)
    for name in one:
        xr.testing.assert_identical(one[name], other[name])


def test_a_killed_demo_continues_to_the_same_numbers(tmp_path):
    command = [sys.executable, "-c", DEMO]
    process = start([*command, str(tmp_path / "killed")])
    wait_for(tmp_path / "killed" / "results-cross_entropy-half.nc", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    unfinished = set(results(tmp_path / "killed"))
    assert start([*command, str(tmp_path / "killed")]).wait() == 0
    assert start([*command, str(tmp_path / "undisturbed")]).wait() == 0
    finished = results(tmp_path / "undisturbed")
    assert 0 < len(unfinished) < len(finished) == 14
    assert_same(results(tmp_path / "killed"), finished)


def test_a_killed_sweep_continues_to_the_same_numbers(tmp_path):
    command = [sys.executable, "-c", "from hesscope.cli import main; main()", *SWEEP, "--out"]
    process = start([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "killed" / "results-part-5-2.nc", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(results(tmp_path / "killed")) >= 8
    again = start([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE)
    said, _ = again.communicate()
    assert again.returncode == 0
    assert "continued an earlier run" in said
    assert start([*command, str(tmp_path / "undisturbed")], stdout=subprocess.DEVNULL).wait() == 0
    finished = results(tmp_path / "undisturbed")
    assert list(finished) == ["results-sweep.nc"]
    assert_same(results(tmp_path / "killed"), finished)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_analysis_continues_to_the_same_numbers(tmp_path, how):
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "STUDY.toml").write_text(STUDY)
    command = [sys.executable, "-c", "from hesscope.cli import main; main()", "analyze"]
    process = start([*command, str(tmp_path / "killed/STUDY.toml")], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(tmp_path / "killed" / "out" / "results-part-0002.nc", process)
    process.send_signal(how)
    _, said = process.communicate()
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert said.count("\n") == 1
        assert "run the same command to continue" in said
    stored = results(tmp_path / "killed" / "out")  # readable, every one of them
    assert len(stored) >= 3
    assert "results-energies.nc" not in stored
    again = start([*command, str(tmp_path / "killed/STUDY.toml")], stdout=subprocess.PIPE)
    said, _ = again.communicate()
    assert again.returncode == 0
    assert "continued an earlier run" in said
    assert start([*command, str(tmp_path / "undisturbed/STUDY.toml")], stdout=subprocess.DEVNULL).wait() == 0
    assert_same(results(tmp_path / "killed" / "out"), results(tmp_path / "undisturbed" / "out"))

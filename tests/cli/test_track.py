"""`hesscope track` as a user types it: the plan, the tables, the page; Ctrl-C; one clear line for bad input."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from unittest.mock import create_autospec

import pytest
import torch

from hesscope.dynamics import open_trajectory
from hesscope.report import dynamics_page
from hesscope.study.config import StudyConfig, TrackConfig
from tests.cli.test_commands import hesscope
from tests.cli.test_spectrum import COMMON
from tests.cli.test_spectrum import write_study as write
from tests.study import user_code
from tests.study.test_interruptions import start

USERS = "tests.study.user_code"
FAST = '[track]\ncheckpoints = "steps"\neigenpairs = 2\n'


def write_study(tmp_path, section=FAST, steps=(0, 1, 2), **changes):
    (tmp_path / "steps").mkdir()
    model = user_code.network()
    for step in steps:
        scaled = {name: (1 + 0.1 * step) * tensor for name, tensor in model.state_dict().items()}
        torch.save(
            {"model": scaled, "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1).state_dict()},
            tmp_path / "steps" / f"{step}.pt",
        )
    return write(tmp_path, section, **changes)


def test_the_command_says_what_it_does_and_what_it_found(tmp_path, monkeypatch, capsys):
    study = write_study(tmp_path)
    page = tmp_path / "out" / "dynamics.html"
    write_page = create_autospec(dynamics_page.write_dynamics_page, return_value=page)  # seconds of drawing
    monkeypatch.setattr(dynamics_page, "write_dynamics_page", write_page)
    code, out, err = hesscope(monkeypatch, capsys, "track", study)
    assert (code, err) == (0, "")  # no progress bar where there is no terminal
    lines = out.splitlines()
    assert lines[0] == "model:     MLP, 48 parameters in 2 tensors"
    assert lines[2] == f"steps:     0 to 2, 3 checkpoints in {tmp_path / 'steps'}"
    assert lines[5] == "rate:      learning rate 0.1"
    assert {"partition:", "measures:", "time:", "results:"} <= {line.split(" ")[0] for line in lines}
    header = next(number for number, line in enumerate(lines) if line.split()[:2] == ["step", "loss"])
    assert lines[lines.index(f"results:   {tmp_path / 'out'}") + 1] == "writing the page ..."  # before what takes long
    assert [line.split()[0] for line in lines[header + 1 : header + 4]] == ["0", "1", "2"]
    assert any(line.strip().startswith("diagonality within fc1") for line in lines)
    assert lines[-1] == f"page: {page}"
    folder, drawn, force, command = write_page.call_args.args
    assert (folder, drawn.steps.tolist(), force.steps.tolist()) == (tmp_path / "out", [0, 1, 2], [[0, 2]])
    assert command.startswith("hesscope track ")
    trajectory = open_trajectory(tmp_path / "out")
    assert [(each.learning_rate, each.stability_limit) for each in trajectory.snapshots] == [(0.1, 20.0)] * 3
    again = hesscope(monkeypatch, capsys, "track", study)[1].splitlines()
    assert "continued an earlier run: 3 finished steps found" in again
    assert "time:      everything is measured; only the page is written again" in again
    # Without energies there are no blocks to tell of.
    study.write_text(study.read_text().replace('"out"', '"other"') + 'measures = ["eigenvalues"]\n')
    code, out, _ = hesscope(monkeypatch, capsys, "track", study)
    assert code == 0
    assert "diagonality" not in out
    assert write_page.call_args.args[2] is None


def test_the_example_has_its_own_section_and_names_the_defaults(monkeypatch, capsys):
    code, example, _ = hesscope(monkeypatch, capsys, "track", "--example")
    assert code == 0
    assert example.startswith(hesscope(monkeypatch, capsys, "analyze", "--example")[1])
    assert [line for line in example.splitlines() if line.startswith("[")] == ["[track]"]
    assert StudyConfig.model_validate(tomllib.loads(example)).track == TrackConfig(checkpoints="checkpoints")
    told = tomllib.loads(example.replace("# learning_rate", "learning_rate"))
    assert set(told["track"]) == set(TrackConfig.model_fields)


def test_ctrl_c_ends_all_processes_with_one_line(tmp_path):
    study = write_study(tmp_path, FAST + 'processes = 2\nmeasures = ["density", "eigenvalues"]\n', range(24))
    command = [sys.executable, "-c", "from hesscope.cli import main; main()", "track", str(study)]
    process = start(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        while not (tmp_path / "out" / "step-000000012.nc").exists():  # the first of the second process
            assert process.poll() is None, "the run ended before it could be interrupted"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert said.count("\n") == 1
        assert "run the same command to continue" in said
        with pytest.raises(ProcessLookupError):  # nobody is left, Python's own helper of processes included
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert 0 < len(open_trajectory(tmp_path / "out")) < 24


SETTINGS = [
    ("", 'track needs a folder of checkpoints: checkpoints = "DIR" in the section [track]'),
    ('checkpoints = "nowhere"', "there is no folder"),
    ('checkpoint = "steps"', "unknown key 'track.checkpoint', did you mean 'checkpoints'?"),
    ("eigenpairs = 0", "track.eigenpairs = 0: input should be greater than or equal to 1"),
    ("measures = []", "track.measures = []: list should have at least 1 item"),
    ("learning_rate = 0", "track.learning_rate = 0: input should be greater than 0"),
    ("learning_rate = inf", "track.learning_rate = inf: input should be a finite number"),
    ("gaps = 1", "track.gaps = 1: input should be a valid boolean"),
    ("processes = 0", "track.processes = 0: input should be greater than or equal to 1"),
    ("threshold = 1.5", "track.threshold = 1.5: input should be less than or equal to 1"),
    ("optimum = nan", "track.optimum = nan: input should be a finite number"),
]


@pytest.mark.parametrize(("line", "words"), SETTINGS, ids=[line for line, _ in SETTINGS])
def test_bad_settings_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, line, words):
    code, out, err = hesscope(monkeypatch, capsys, "track", write_study(tmp_path, f"[track]\n{line}\n"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["STUDY.toml", "steps"]


# What all commands refuse, but for a key that this one does not read and a model that no checkpoint fits.
STUDIES = [
    case for case in COMMON if "checkpoint" not in case[0] and f"{USERS}:infinite_curvature" not in case[0].values()
]


@pytest.mark.parametrize(("changes", "words"), STUDIES, ids=[next(iter(c)) + "-" + w[:20] for c, w in STUDIES])
def test_bad_studies_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, changes, words):
    study = write_study(tmp_path, **changes)
    code, out, err = hesscope(monkeypatch, capsys, "track", study)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err or "does not fit the model" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["STUDY.toml", "steps"]


def test_it_needs_a_study(monkeypatch, capsys):
    code, _, err = hesscope(monkeypatch, capsys, "track")
    assert (code, err.count("\n")) == (2, 1)
    assert "track needs a STUDY.toml (hesscope track --example prints one to start from)" in err

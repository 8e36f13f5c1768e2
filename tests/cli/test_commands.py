"""Commands as a user types them: exit codes, one clear line for bad input, nothing half-written."""

import subprocess
import sys
import time

import pytest

from hesscope._version import __version__
from hesscope.cli import main
from hesscope.core import memory

HERE = "tests.study.user_code"


def hesscope(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hesscope", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def write_study(tmp_path, **changes):
    values = {"model": f"{HERE}:network", "data": f"{HERE}:tensors", "output": "out", **changes}
    lines = [f"{key} = {value}" if isinstance(value, int) else f'{key} = "{value}"' for key, value in values.items()]
    path = tmp_path / "STUDY.toml"
    path.write_text("\n".join(lines))
    return path


BAD = [
    ({"modle": "x:y"}, "unknown key 'modle', did you mean 'model'?"),
    ({"model": f"{HERE}:netwrk"}, "has no 'netwrk', did you mean 'network'?"),
    ({"checkpoint": "missing.pt"}, "does not exist"),
    ({"data": f"{HERE}:wrong_targets"}, "batch 1: targets must lie in [0, 3), found"),
    ({"data": f"{HERE}:infinite_inputs"}, "the loss is nan on batch 1"),
    ({"data": f"{HERE}:empty_loader"}, "data is empty"),
    ({"data": f"{HERE}:shuffling_loader"}, "different data on a second pass, first in batch 0"),
    ({"model": f"{HERE}:Noisy"}, "random in eval mode"),
    ({"model": f"{HERE}:OnceDifferentiable"}, "once_differentiable"),
    ({"model": f"{HERE}:frozen_network"}, "no trainable parameter"),
    ({"partition": f"{HERE}:overlapping"}, "blocks overlap: parameter fc1.weight[0]"),
    ({"partition": f"{HERE}:incomplete"}, "the blocks miss 18 of 48 parameters"),
    ({"partition": "rows"}, "did you mean 'row'?"),
    ({"loss": f"{HERE}:vector_loss"}, "the loss must be a scalar"),
    ({"loss": "crossentropy"}, "did you mean 'cross_entropy'?"),
    ({"loss": "mse"}, "class labels must be one-hot encoded"),
    ({"loss": f"{HERE}:Weighted"}, "the loss module Weighted is not known"),
    ({"model": f"{HERE}:infinite_curvature"}, "the Hessian is not finite on batch 0"),
    ({"model": f"{HERE}:leave"}, "failed: SystemExit: 3"),
    ({"output": ""}, "output = ''"),
    ({"method": "exakt"}, "did you mean 'exact'?"),
    ({"probes": 1}, "probes must be at least 2"),
    ({"model": "tests.study.user_code:failing"}, "RuntimeError: no such luck"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[next(iter(c)) + "-" + w[:20] for c, w in BAD])
def test_bad_studies_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, changes, words):
    code, out, err = hesscope(monkeypatch, capsys, "analyze", write_study(tmp_path, **changes))
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["STUDY.toml"]


STATIC = [
    (("theory", "--classes", "1,10"), "classes must be at least 2, got 1"),
    (("theory", "--classes", "ten"), "--classes must be whole numbers separated by commas, got 'ten'"),
    (("theory", "--classes", ""), "classes must name at least one value"),
    (("theory", "--classes", "10,10"), "and each once"),
    (("theory", "--gamma", "0"), "gamma must be positive"),
    (("theory", "--gamma", "0.5,nan"), "gamma must be positive"),
    (("theory", "--width", "8,2"), "needs width > 2"),
    (("theory", "--loss", "crossentropy"), "did you mean 'cross_entropy'?"),
    (("theory", "--model", "lineer"), "did you mean 'linear'?"),
    (("theory", "--activation", "rellu"), "did you mean 'relu'?"),
    (("theory", "--rtol", "0"), "rtol must lie between 0 and 1"),
    (("theory", "--output-scale", "-1"), "output_scale must be positive"),
    (("sweep", "--classes", "10"), "at least two different numbers"),
    (("sweep", "--classes", "1,10"), "from 2 on"),
    (("sweep", "--classes", "10,3"), "ascending"),
    (("sweep", "--networks", "1"), "at least 2 networks"),
    (("sweep", "--width", "2"), "needs width > 2"),
    (("sweep", "--samples", "1"), "samples must be at least 2"),
    (("sweep", "--rtol", "2"), "rtol must lie between 0 and 1"),
    (("sweep", "--inputs", "0"), "inputs must be a positive integer"),
    (("sweep", "--loss", ""), "losses must name each loss once"),
]


@pytest.mark.parametrize(("arguments", "words"), STATIC, ids=[" ".join(arguments) for arguments, _ in STATIC])
def test_bad_static_forces_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, arguments, words):
    code, out, err = hesscope(monkeypatch, capsys, *arguments, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (tmp_path / "out").exists()


def test_theory_prints_a_table_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    command = ("theory", "--model", "linear", "--classes", "2,100", "--gamma", "0.5,1", "--out", tmp_path / "out")
    code, out, err = hesscope(monkeypatch, capsys, *command)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["loss", "gamma", "C", "output", "r", "C^2", "r", "limit"]
    assert lines[2].split() == ["cross-entropy", "0.5", "100", "0.000184", "1.84", "1.99"]
    assert lines[-1] == f"page: {tmp_path / 'out' / 'report.html'}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "results-theory.nc", "figures"}
    assert "1 finished step found" in hesscope(monkeypatch, capsys, *command)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("demo", "--nonsense"), "No such option"),
        (("demo", "--seed", "x"), "seed"),
        (("analyze",), "needs a STUDY.toml"),
        (("analyze", "nowhere.toml"), "cannot read nowhere.toml"),
    ],
)
def test_bad_commands_get_one_line(monkeypatch, capsys, arguments, words):
    code, _, err = hesscope(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert words in err


def test_an_output_folder_that_is_a_file_is_refused_before_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("mine")
    code, _, err = hesscope(monkeypatch, capsys, "analyze", write_study(tmp_path))
    assert code == 2
    assert "is not a folder" in err
    code, _, err = hesscope(monkeypatch, capsys, "demo", "--out", tmp_path / "out" / "demo")
    assert code == 2
    assert "is not a folder" in err


def test_too_many_samples_for_memory_say_how_much(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 1000)
    code, _, err = hesscope(monkeypatch, capsys, "analyze", write_study(tmp_path, method="probes"))
    assert code == 2
    assert "MiB, but 1000 bytes are available; use fewer probes" in err
    assert not (tmp_path / "out").exists()


def test_analyze_prints_its_plan_then_the_page(tmp_path, monkeypatch, capsys):
    study = write_study(tmp_path)
    code, out, err = hesscope(monkeypatch, capsys, "analyze", study)
    assert code == 0
    assert err == ""  # no progress bar where there is no terminal
    assert "products" in out
    assert out.splitlines()[-1] == f"page: {tmp_path / 'out' / 'report.html'}"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "results-energies.nc", "figures"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "one block per row" in page
    code, out, _ = hesscope(monkeypatch, capsys, "analyze", study)
    assert code == 0
    assert "continued an earlier run: 1 finished step found" in out


def test_the_example_can_be_run_as_it_is(tmp_path, monkeypatch, capsys):
    _, example, _ = hesscope(monkeypatch, capsys, "analyze", "--example")
    (tmp_path / "STUDY.toml").write_text(example)
    code, out, _ = hesscope(monkeypatch, capsys, "analyze", tmp_path / "STUDY.toml")
    assert code == 0
    assert "1,184 parameters" in out


def test_version(monkeypatch, capsys):
    assert hesscope(monkeypatch, capsys, "--version")[:2] == (0, f"hesscope {__version__}\n")


def test_help_is_fast_and_does_not_import_torch():
    code = "import sys; sys.argv = ['hesscope', '--help']; from hesscope.cli import main\ntry: main()\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 1.0
    assert "analyze" in out
    assert out.endswith("False\n")

"""`hesscope spectrum` as a user types it: the plan, the tables, the page; one clear line for bad input."""

import tomllib

import pytest
import torch
import xarray as xr

import hesscope as hs
from hesscope.study.config import SpectrumConfig, StudyConfig, read_config
from hesscope.study.spectrum import prepare_spectrum
from tests.cli.test_commands import BAD, hesscope
from tests.study import user_code

HERE = "tests.study.user_code"
FAST = "[spectrum]\neigenpairs = 3\nprobes = 2\nsteps = 8\nblock_probes = 2\nblock_steps = 6\n"


def write_study(tmp_path, section=FAST, **changes):
    values = {"model": f"{HERE}:network", "data": f"{HERE}:tensors", "output": "out", **changes}
    lines = [f"{key} = {value}" if isinstance(value, int) else f'{key} = "{value}"' for key, value in values.items()]
    path = tmp_path / "STUDY.toml"
    path.write_text("\n".join(lines) + "\n" + section)
    return path


def test_the_command_says_what_it_does_and_what_it_found(tmp_path, monkeypatch, capsys):
    study = write_study(tmp_path)
    code, out, err = hesscope(monkeypatch, capsys, "spectrum", study)
    assert (code, err) == (0, "")  # no progress bar where there is no terminal
    lines = out.splitlines()
    assert lines[0] == "model:     MLP, 48 parameters in 2 tensors"
    assert {"matrix:", "partition:", "products:", "time:", "memory:"} <= {line.split(" ")[0] for line in lines}
    objective = hs.Objective(user_code.network(), "cross_entropy", user_code.tensors())
    largest = float(torch.linalg.eigvalsh(hs.Hessian(objective).dense())[-1])
    (headline,) = [line for line in lines if line.startswith("The largest curvature is")]
    assert float(headline.split(";")[0].split()[-1]) == pytest.approx(largest, rel=0.005)
    (row,) = [line.split() for line in lines if "largest eigenvalue λ max" in line]
    assert float(row[4]) == pytest.approx(largest, rel=1e-3)
    assert [line.split()[0] for line in lines if line.strip().startswith("fc")] == ["fc1", "fc2"]
    assert lines[-1] == f"page: {tmp_path / 'out' / 'spectrum.html'}"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"spectrum.html", "results-spectrum.nc", "results-density.nc", "figures"} <= names
    assert not [name for name in names if "block" in name]
    result = xr.load_dataset(tmp_path / "out" / "results-spectrum.nc")
    assert float(result["value"].sel(quantity="largest")) == pytest.approx(largest, rel=1e-6)
    assert "Hessian, 48 parameters" in result.attrs["explanation"]
    monkeypatch.setattr("hesscope.report.spectrum_page.write_spectrum_page", lambda *_: tmp_path)  # seconds of drawing
    code, out, _ = hesscope(monkeypatch, capsys, "spectrum", study)
    assert code == 0
    assert "continued an earlier run: 1 finished step found" in out


def test_the_example_is_that_of_analyze_and_names_the_defaults(tmp_path, monkeypatch, capsys):
    code, example, _ = hesscope(monkeypatch, capsys, "spectrum", "--example")
    assert code == 0
    assert example.startswith(hesscope(monkeypatch, capsys, "analyze", "--example")[1])
    assert [line for line in example.splitlines() if line.startswith("[")] == ["[spectrum]"]
    assert StudyConfig.model_validate(tomllib.loads(example)).spectrum == SpectrumConfig()


def test_a_study_written_for_analyze_works_unchanged(tmp_path):
    config = read_config(write_study(tmp_path, section="", partition="row", method="exact", probes=4))
    study = prepare_spectrum(config, tmp_path)
    assert (len(study.partition), study.settings) == (9, SpectrumConfig())


SETTINGS = [
    ("eigenpairs = 49", "spectrum.eigenpairs must be at most the number of parameters, 48, got 49"),
    ("eigenpair = 4", "unknown key 'spectrum.eigenpair', did you mean 'eigenpairs'?"),
    ("eigenpairs = 0", "spectrum.eigenpairs = 0: input should be greater than or equal to 1"),
    ("eigenpairs = 2.5", "spectrum.eigenpairs = 2.5: input should be a valid integer"),
    ("probes = 1", "spectrum.probes = 1: input should be greater than or equal to 2"),
    ("rtol = 1", "spectrum.rtol = 1: input should be less than 1"),
    ("rtol = nan", "spectrum.rtol = nan"),
    ("residual = 0", "spectrum.residual = 0: input should be greater than 0"),
    ("max_products = 8", "spectrum.max_products must be at least 2 * eigenpairs + 2 = 22, got 8"),
    ('matrix = "hesian"', "spectrum.matrix must be one of 'hessian', 'gauss_newton', got 'hesian', did you mean"),
]


@pytest.mark.parametrize(("line", "words"), SETTINGS, ids=[line for line, _ in SETTINGS])
def test_bad_settings_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, line, words):
    assert_refused(monkeypatch, capsys, write_study(tmp_path, f"[spectrum]\n{line}\n"), words)


# What both commands refuse, but for keys that only analyze reads.
COMMON = [case for case in BAD if not {"method", "probes"} & set(case[0])]


@pytest.mark.parametrize(("changes", "words"), COMMON, ids=[next(iter(c)) + "-" + w[:20] for c, w in COMMON])
def test_bad_studies_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, changes, words):
    assert_refused(monkeypatch, capsys, write_study(tmp_path, **changes), words)


def test_a_gauss_newton_matrix_needs_a_known_loss(tmp_path, monkeypatch, capsys):
    study = write_study(tmp_path, '[spectrum]\nmatrix = "gauss_newton"\n', loss=f"{HERE}:sum_loss")
    assert_refused(monkeypatch, capsys, study, "Gauss-Newton")


def assert_refused(monkeypatch, capsys, study, words):
    code, out, err = hesscope(monkeypatch, capsys, "spectrum", study)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert [path.name for path in study.parent.iterdir()] == ["STUDY.toml"]


def test_the_command_needs_a_study(monkeypatch, capsys):
    code, _, err = hesscope(monkeypatch, capsys, "spectrum")
    assert code == 2
    assert err == "hesscope: spectrum needs a STUDY.toml (hesscope spectrum --example prints one to start from)\n"

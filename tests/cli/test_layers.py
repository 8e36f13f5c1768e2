"""`hesscope layers` and `hesscope compare` as a user types them: plan, tables, pages; one clear line for bad input."""

import pytest

from hesscope.core.result_files import open_result
from hesscope.layerwise import SharedEigenspaces
from tests.cli.test_commands import hesscope
from tests.cli.test_spectrum import COMMON, write_study

USERS = "tests.study.user_code"
FAST = '[layers]\nlayers = ["fc2"]\neigenpairs = 3\nfull = 2\n'


def test_both_commands_say_what_they_do_and_what_they_found(tmp_path, monkeypatch, capsys):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    studies = [write_study(tmp_path / name, FAST, seed=seed) for seed, name in enumerate(("one", "other"))]
    code, out, err = hesscope(monkeypatch, capsys, "layers", studies[0])
    assert (code, err) == (0, "")  # no progress bar where there is no terminal
    lines = out.splitlines()
    assert lines[0] == "model:     MLP, 48 parameters in 2 tensors"
    assert lines[2] == "layers:    1: fc2 (linear, 3 x 6)"
    assert {"matrix:", "time:", "disk:", "results:"} <= {line.split(" ")[0] for line in lines}
    assert [line.split()[0] for line in lines if line.strip().startswith("fc2")] == ["fc2"]
    assert lines[-1] == f"page: {tmp_path / 'one' / 'out' / 'layers.html'}"
    assert (tmp_path / "one" / "out" / "layers.html").stat().st_size > 10_000
    monkeypatch.setattr("hesscope.report.layers_page.write_layers_page", lambda *_: tmp_path)  # seconds of drawing
    again = hesscope(monkeypatch, capsys, "layers", studies[0])[1].splitlines()
    assert "continued an earlier run: 5 finished steps found" in again
    table = next(number for number, line in enumerate(lines) if line.split()[:2] == ["layer", "shape"])
    assert again[-4:-2] == lines[table : table + 2]

    compare = ("compare", tmp_path / "one" / "out", studies[1], "--out", tmp_path / "compared")
    code, out, err = hesscope(monkeypatch, capsys, *compare)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{studies[1]} has no results of `hesscope layers`: run `hesscope layers {studies[1]}` first" in err
    assert hesscope(monkeypatch, capsys, "layers", studies[1])[0] == 0
    compare += ("--layer", "fc2", "--k", "2")
    code, out, err = hesscope(monkeypatch, capsys, *compare)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [
        f"run:       one/out: MLP, {USERS}:tensors",
        f"run:       other/out: MLP, {USERS}:tensors",
        "layers:    fc2",
    ]
    assert lines[-1] == f"page: {tmp_path / 'compared' / 'compare.html'}"
    assert (tmp_path / "compared" / "compare.html").stat().st_size > 10_000
    shared = SharedEigenspaces.from_xarray(open_result(tmp_path / "compared" / "results-shared-000.nc"))
    assert shared.curves.shape == (1, 2)
    assert shared.mean == pytest.approx([1, 1], abs=1e-4)  # one network
    monkeypatch.setattr("hesscope.report.compare_page.write_compare_page", lambda *_: tmp_path)
    assert "continued an earlier run: 1 finished step found" in hesscope(monkeypatch, capsys, *compare)[1]


def test_the_example_is_that_of_analyze_with_its_own_section(monkeypatch, capsys):
    code, example, _ = hesscope(monkeypatch, capsys, "layers", "--example")
    assert code == 0
    assert example.startswith(hesscope(monkeypatch, capsys, "analyze", "--example")[1])
    assert [line for line in example.splitlines() if line.startswith("[")] == ["[layers]"]


SETTINGS = [
    ('layers = ["fc3"]', "there is no layer 'fc3'; the layers are 'fc1', 'fc2', did you mean 'fc2'?"),
    ('sharing = "expant"', "layers.sharing must be one of 'expand', 'reduce', got 'expant', did you mean 'expand'?"),
    (
        "eigenpairs = 19",
        "layers.eigenpairs must be at most the number of parameters of every layer, 18 of 'fc2', got 19",
    ),
    ("eigenpairs = 0", "layers.eigenpairs = 0: input should be greater than or equal to 1"),
    ("eigenpair = 4", "unknown key 'layers.eigenpair', did you mean 'eigenpairs'?"),
    ("layers = []", "layers.layers = []: list should have at least 1 item"),
    ("full = -1", "layers.full = -1: input should be greater than or equal to 0"),
    ("errors = 1", "layers.errors = 1: input should be a valid boolean"),
]


@pytest.mark.parametrize(("line", "words"), SETTINGS, ids=[line for line, _ in SETTINGS])
def test_bad_settings_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, line, words):
    code, out, err = hesscope(monkeypatch, capsys, "layers", write_study(tmp_path, f"[layers]\n{line}\n"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["STUDY.toml"]


# What all commands refuse, but for a key that this one does not read.
STUDIES = [case for case in COMMON if "partition" not in case[0]]


@pytest.mark.parametrize(("changes", "words"), STUDIES, ids=[next(iter(c)) + "-" + w[:20] for c, w in STUDIES])
def test_bad_studies_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, changes, words):
    code, out, err = hesscope(monkeypatch, capsys, "layers", write_study(tmp_path, "", **changes))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["STUDY.toml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("layers",), "layers needs a STUDY.toml (hesscope layers --example prints one to start from)"),
        (("compare",), "Missing argument"),
        (("compare", "here"), "compare needs at least two runs of `hesscope layers`, got 1"),
        (("compare", "here", "there"), "there is no folder or STUDY.toml here"),
    ],
)
def test_bad_commands_get_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = hesscope(monkeypatch, capsys, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert not list(tmp_path.iterdir())

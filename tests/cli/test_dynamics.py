"""`hesscope dynamics` as a user types it: the list of presets, a run, its page, and one clear line for bad input."""

import pytest

from hesscope.dynamics import open_trajectory
from hesscope.study.presets import PRESETS
from tests.cli.test_commands import hesscope
from tests.study.test_dynamics import SMALL_CLUSTERS, SMALL_GAUSSIAN

# With 60 inputs.
SMALL = {"clusters": SMALL_CLUSTERS, "gaussian": SMALL_GAUSSIAN}
TINY = ("--steps", 2, "--snapshots", 3, "--samples", 20, "--classes", 2)


def test_without_a_name_all_presets_are_listed_with_what_they_take(monkeypatch, capsys):
    code, out, err = hesscope(monkeypatch, capsys, "dynamics")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["preset", *PRESETS, "all"]
    assert max(map(len, lines)) <= 100
    said = " ".join(out.split())
    for preset in PRESETS.values():
        assert f"{preset.name} {preset.description} --steps={preset.defaults.steps} --snapshots=" in said
    assert "--samples=1000 --seed=0 --loss=cross_entropy --optimizer=adam --classes=10 clusters" in said
    assert lines[-1].split()[:4] == ["all", "--budget", "and", "--out"]


def test_a_run_says_what_it_does_and_found_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "clusters", SMALL["clusters"])
    written = []

    def write_page(folder, trajectory, force, command, title):
        written.append((folder, len(trajectory), force is not None, command, title))
        return folder / "dynamics.html"

    monkeypatch.setattr("hesscope.report.dynamics_page.write_dynamics_page", write_page)
    code, out, err = hesscope(monkeypatch, capsys, "dynamics", "clusters", "--loss", "mse", *TINY)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "preset:    clusters: the same network on clustered data, one cluster a class"
    assert "model:     MLP, 496 parameters, on this cpu" in lines
    assert "training:  2 steps of Adam, learning rate 0.01" in lines
    assert "steps:     0, 1, 2" in lines
    assert lines[lines.index("results:   out/dynamics/clusters-mse-adam-C2") + 1] == "writing the page ..."
    folder = tmp_path / "out" / "dynamics" / "clusters-mse-adam-C2"
    assert lines[-1] == f"page: {folder / 'dynamics.html'}"
    assert open_trajectory(folder).steps.tolist() == [0, 1, 2]
    again = hesscope(monkeypatch, capsys, "dynamics", "clusters", "--loss", "mse", *TINY)[1].splitlines()
    assert "continued an earlier run: 3 finished steps found" in again
    assert again[-3:] == lines[-3:]
    assert written[0][1:3] == (3, True)
    assert (written[0][3].split()[:3], written[0][4]) == (["hesscope", "dynamics", "clusters"], lines[0][21:])


def test_gaussian_inputs_have_the_prediction_beside_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "gaussian", SMALL["gaussian"])
    monkeypatch.setattr("hesscope.report.dynamics_page.write_dynamics_page", lambda *_: tmp_path)
    out = hesscope(monkeypatch, capsys, "dynamics", "gaussian", "--loss", "mse", *TINY, "--out", tmp_path / "run")[1]
    lines = out.splitlines()
    header = next(number for number, line in enumerate(lines) if "predicted" in line)
    cells = [line.split() for line in lines[header + 1 : header + 3]]
    assert [row[0] for row in cells] == ["fc1", "fc2"]
    snapshot = open_trajectory(tmp_path / "run").snapshots[0]
    assert float(cells[0][1]) == pytest.approx(snapshot.off_diagonal_ratio("fc1"), rel=0.01)
    assert cells[1][1:] == ["0", "0", "0"]  # exactly block-diagonal under squared error


BAD = [
    (("cluster",), "no preset is named 'cluster', did you mean 'clusters'?"),
    (("clusters", "--classes", "1"), "--classes must be at least 2, got 1"),
    (("digits", "--classes", "10"), "preset 'digits' does not take --classes; it takes --steps"),
    (("clusters", "--budget", "2"), "--budget must be a share of the training's time in (0, 1], got 2.0"),
    (("clusters", "--steps", "many"), "Invalid value for '--steps'"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = hesscope(monkeypatch, capsys, "dynamics", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not list(tmp_path.iterdir())

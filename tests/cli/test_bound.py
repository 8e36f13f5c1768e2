"""`hesscope bound` as a user types it: presets, a run, a stopped run, a study; one clear line for bad input."""

import pytest
import torch

from hesscope.layerwise import gibbs, pac_bayes
from hesscope.study.bound_presets import BOUND_PRESETS
from tests.cli.test_commands import hesscope
from tests.study import test_bound as own

TINY = ("--hidden", "8", "--samples", 200, "--epochs", 3, "--steps", 20, "--labels", "true")
OPTIMIZED = "diagonal_optimized"


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(gibbs, "LOCAL_DRAWS", 2000)
    monkeypatch.setattr(pac_bayes, "CHOOSING_DRAWS", {True: 400, False: 4})


@pytest.fixture
def written(monkeypatch):
    """What the page was written of, in place of the page."""
    calls = []

    def write_page(folder, results, command, title):
        calls.append((results, command, title))
        return folder / "bound.html"

    monkeypatch.setattr("hesscope.report.bound_page.write_bound_page", write_page)
    return calls


def test_without_a_name_all_presets_are_listed_with_what_they_take(monkeypatch, capsys):
    code, out, err = hesscope(monkeypatch, capsys, "bound")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["preset", *BOUND_PRESETS, "all"]
    assert max(map(len, lines)) <= 100
    said = " ".join(out.split())
    assert "--hidden=600 --classes=2 --samples=1437 --epochs=100 (600 on random labels) --seed=0 patches" in said
    assert "mnist [DR]'s and [W]'s experiment on your own copy of MNIST" in said
    assert "--folder=DIR --hidden=600 --classes=2 --samples=55000 --epochs=20 (120 on random labels)" in said
    assert lines[-1].split()[:3] == ["all", "--labels", "--posteriors"]


def test_a_run_says_what_it_does_and_found_and_is_not_repeated(tmp_path, monkeypatch, capsys, written):
    monkeypatch.chdir(tmp_path)
    run = ("bound", "digits", *TINY, "--posteriors", f"{OPTIMIZED}, isotropic")
    code, out, err = hesscope(monkeypatch, capsys, *run)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("preset:    digits: a ReLU network on scikit-learn's handwritten digits")
    assert "network:   64-8-2 ReLU network, 538 parameters" in lines
    assert "data:      200 of scikit-learn's handwritten digits, 0-4 against 5-9" in lines
    assert "held out:  1,597 held-out digits" in lines
    assert "posterior: isotropic, diagonal_optimized" in lines
    assert lines[lines.index("results:   out/bound/digits-8-C2") + 1] == "writing the page ..."
    table = next(number for number, line in enumerate(lines) if line.split()[:3] == ["labels", "posterior", "bound"])
    assert [line.split()[0] for line in lines[table + 1 : table + 3]] == ["true", "true"]
    assert any(line.startswith("With ") and "64-8-2 ReLU network" in line for line in lines[:table])
    assert lines[-1] == f"page: {tmp_path / 'out' / 'bound' / 'digits-8-C2' / 'bound.html'}"
    again = hesscope(monkeypatch, capsys, *run)[1].splitlines()
    assert "continued an earlier run: 4 finished steps found" in again
    assert again[-5:] == lines[-5:]
    results, command, title = written[0]
    assert [each.attrs["posterior"] for each in results] == ["isotropic", OPTIMIZED]
    assert command.split()[:3] == ["hesscope", "bound", "digits"]
    assert title.startswith("64-8-2 ReLU network, 538 parameters, on 200 of scikit-learn's handwritten digits")


def test_a_stopped_run_shows_what_it_has_reached(tmp_path, monkeypatch, capsys, written):
    from hesscope.study import bound

    monkeypatch.chdir(tmp_path)
    real = bound.pac_bayes_bound

    def stopped(objective, prior, posterior, delta, *, on_round, **options):
        """Ctrl-C after the second round."""
        rounds = []

        def count(reached):
            on_round(reached)
            rounds.append(reached)
            if posterior == OPTIMIZED and len(rounds) == 2:
                raise KeyboardInterrupt

        return real(objective, prior, posterior, delta, on_round=count, **options)

    monkeypatch.setattr(bound, "pac_bayes_bound", stopped)
    run = ("bound", "digits", *TINY, "--posteriors", f"isotropic,{OPTIMIZED}", "--out", "run")
    code, out, err = hesscope(monkeypatch, capsys, *run)
    assert code == 130
    assert err == "hesscope: interrupted; finished steps are kept, run the same command to continue\n"
    assert "step 4 of 20" in out
    rows = [line for line in out.splitlines() if line.split()[:1] == ["true"]]
    assert ["closed form" in row for row in rows] == [True, False]
    assert written == []
    monkeypatch.setattr(bound, "pac_bayes_bound", real)
    code, out, _ = hesscope(monkeypatch, capsys, *run)
    assert (code, "step 4 of 20" in out, "20 steps" in out) == (0, False, True)
    assert "continued an earlier run: 3 finished steps found" in out


def test_a_study_is_bounded(tmp_path, monkeypatch, capsys, written):
    torch.save(own.fit(own.network()).state_dict(), tmp_path / "weights.pt")
    study = tmp_path / "STUDY.toml"
    study.write_text(
        f'model = "{own.HERE}:network"\ndata = "{own.HERE}:samples"\ncheckpoint = "weights.pt"\noutput = "out"\n'
        f'[bound]\nposteriors = ["diagonal"]\nheld_out = "{own.HERE}:samples"\n'
        "held_out_arguments = { first = 300, last = 400 }\n"
    )
    code, out, err = hesscope(monkeypatch, capsys, "bound", study)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "model:     MLP, 538 parameters"
    assert f"prior:     at the initialization by {own.HERE}:network" in lines
    assert "held out:  100 held-out samples" in lines
    assert lines[-1] == f"page: {tmp_path / 'out' / 'bound.html'}"
    code, out, err = hesscope(monkeypatch, capsys, "bound", study, "--delta", "0.1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--delta is for presets; a STUDY.toml says it (hesscope bound --example)" in err
    study.write_text(study.read_text().replace("checkpoint", "# checkpoint"))
    code, _, err = hesscope(monkeypatch, capsys, "bound", study)
    assert (code, err) == (
        2,
        "hesscope: bound needs a checkpoint, the trained parameters: a bound is of a network that was trained\n",
    )


def test_the_page_of_a_run_is_written(tmp_path, monkeypatch, capsys):
    run = ("bound", "digits", *TINY, "--posteriors", "diagonal", "--out", tmp_path / "run")
    assert hesscope(monkeypatch, capsys, *run)[0] == 0
    assert (tmp_path / "run" / "bound.html").stat().st_size > 10_000


def test_the_example_is_that_of_analyze_with_its_own_section(monkeypatch, capsys):
    code, example, _ = hesscope(monkeypatch, capsys, "bound", "--example")
    assert code == 0
    assert example.startswith(hesscope(monkeypatch, capsys, "analyze", "--example")[1])
    assert [line for line in example.splitlines() if line.startswith("[")] == ["[bound]"]


BAD = [
    (("digit",), "no preset is named 'digit', did you mean 'digits'?"),
    (("digits", "--posteriors", "kroneker"), "--posteriors must be some of isotropic, "),
    (("digits", "--posteriors", "kroneker"), "got 'kroneker', did you mean 'kronecker'?"),
    (("digits", "--posteriors", ","), "--posteriors must name at least one of"),
    (("digits", "--delta", "1"), "--delta must"),
    (("digits", "--delta", "nan"), "--delta must"),
    (("digits", "--classes", "3"), "--classes must be 2 or 10, got 3"),
    (("patches", "--classes", "2"), "preset 'patches' does not take --classes; it takes --hidden"),
    (("digits", "--samples", "20"), "n = 20 samples are too few for a grid of"),
    (("digits", "--samples", "1797"), "--samples must be below 1,797, all digits there are"),
    (("digits", "--samples", "0"), "--samples must be a positive integer, got 0"),
    (("digits", "--epochs", "-1"), "--epochs must be a positive integer, got -1"),
    (("digits", "--steps", "0"), "--steps must be a positive integer, got 0"),
    (("digits", "--minutes", "0"), "--minutes must"),
    (("digits", "--hidden", "600,many"), "--hidden must be whole numbers separated by commas, got '600,many'"),
    (("digits", "--hidden", "6,6,6,6"), "--hidden must be one to 3 widths, got 4"),
    (("digits", "--hidden", "0"), "each width of --hidden must be a positive integer, got 0"),
    (
        ("digits", "--labels", "tru"),
        "--labels must be one of 'true', 'random', 'both', got 'tru', did you mean 'true'?",
    ),
    (("digits", "--folder", "here"), "preset 'digits' does not take --folder"),
    (("mnist",), "preset 'mnist' needs --folder, your own copy of the data: nothing is downloaded"),
    (("mnist", "--folder", "nowhere"), "folder = nowhere is not a folder"),
    (("nowhere.toml",), "cannot read nowhere.toml: No such file"),
    (("--seed", "3"), "--seed needs a preset to go with"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(each) for each, _ in BAD])
def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = hesscope(monkeypatch, capsys, "bound", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not list(tmp_path.iterdir())

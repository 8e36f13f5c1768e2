"""`hesscope advise` as a user types it."""

import json

from tests.cli.test_commands import hesscope
from tests.cli.test_spectrum import write_study


def test_the_command_says_what_it_does_and_what_it_found(tmp_path, monkeypatch, capsys):
    study = write_study(tmp_path, "[advise]\nprobes = 16\n", model="tests.study.user_code:planted_rows", loss="mse")
    study.write_text(study.read_text().replace("user_code:tensors", "user_code:correlated_points"))
    code, out, err = hesscope(monkeypatch, capsys, "advise", study)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "model:     MLP, 15 parameters in 1 tensors"
    assert any(line.startswith("Best block-diagonal: with one block per row") for line in lines)
    assert lines[-1] == f"page: {tmp_path / 'out' / 'advise.html'}"
    assert lines[-2] == f"advice: {tmp_path / 'out' / 'advice.json'}"
    advice = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert advice["verdict"]["name"] == "row"
    code, out, _ = hesscope(monkeypatch, capsys, "advise", study)
    assert code == 0
    assert "continued an earlier run" in out


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    for section, words in (
        ("[advise]\nprobes = 20\n", "advise.probes = 20: input should be a multiple of 8"),
        ("[advise]\nprobe = 16\n", "unknown key 'advise.probe', did you mean 'probes'?"),
        ('[advise]\npartitions = ["heads"]\n', "did you mean 'head'?"),
    ):
        study = write_study(tmp_path, section)
        code, out, err = hesscope(monkeypatch, capsys, "advise", study)
        assert code == 2 and out == ""
        assert err.count("\n") == 1 and words in err
        assert not (tmp_path / "out").exists()
    code, _, err = hesscope(monkeypatch, capsys, "advise")
    assert code == 2 and "advise needs a STUDY.toml" in err

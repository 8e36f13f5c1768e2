import pytest

from hesscope.core.errors import InputError
from hesscope.study.config import (
    EXAMPLE,
    SECTIONS,
    BoundConfig,
    SpectrumConfig,
    StudyConfig,
    example_study,
    read_config,
)

MINIMAL = 'model = "a:b"\ndata = "c:d"\noutput = "out"\n'


def write(tmp_path, text):
    path = tmp_path / "STUDY.toml"
    path.write_text(text)
    return path


def test_the_example_is_valid_and_mentions_every_key(tmp_path):
    config = read_config(write(tmp_path, EXAMPLE))
    assert config.partition == "row"
    for key in [*StudyConfig.model_fields, *SpectrumConfig.model_fields, *BoundConfig.model_fields]:
        assert f"{key} =" in EXAMPLE or f"[{key}]" in EXAMPLE


@pytest.mark.parametrize("command", ["analyze", *SECTIONS])
def test_examples_have_the_sections_that_a_command_reads(tmp_path, command):
    config = read_config(write(tmp_path, example_study(command)))
    assert config.model_fields_set & set(SECTIONS) == {command} - {"analyze"}


def test_defaults(tmp_path):
    config = read_config(write(tmp_path, MINIMAL))
    assert (config.loss, config.method, config.seed, config.probes) == ("cross_entropy", "auto", 0, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "probe = 3\n", "unknown key 'probe', did you mean 'probes'?"),
        ('data = "c:d"\noutput = "out"\n', "the key 'model' is missing"),
        (MINIMAL + 'probes = "many"\n', "probes = 'many': input should be a valid integer"),
        (MINIMAL + "seed = 1.5\n", "seed = 1.5"),
        ("model = \n", "is not valid TOML"),
        (MINIMAL + "[bound]\ndelta = 1.0\n", "bound.delta = 1.0: input should be less than 1"),
        (MINIMAL + "[bound]\nposterior = []\n", "unknown key 'bound.posterior', did you mean 'posteriors'?"),
        (MINIMAL + "[bound]\nminutes = inf\n", "bound.minutes = inf"),
        ("[model]\nfactory = 3\n", "model = {'factory': 3}: input should be a valid string"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(InputError) as caught:
        read_config(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.toml: No such file"):
        read_config(tmp_path / "nowhere.toml")

"""The output layer of saved language models, against the models' own logits, hidden states and losses."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
import xarray as xr
from torch.nn import functional

import hesscope as hs
from hesscope.core.errors import InputError, ModelError, TooLargeError
from hesscope.study import head, language_model
from hesscope.study.head import HeadSettings, head_store, prepare_head, run_head
from hesscope.study.language_model import visible
from tests.helpers import relative_error
from tests.language_models import folder_of, library_text

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


def silent(title, share):
    pass


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name of a model -> its folder, made on first use."""
    return lambda name: folder_of(tmp_path_factory, name)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(library_text()[5000:9000])
    return path


def measure(out, settings):
    store = head_store(out, settings)
    run_head(prepare_head(settings), store, silent)
    return store.require("head")


def own_model(settings):
    """Model and the text's first tokens, loaded by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(settings.model, local_files_only=True).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
    return model, torch.tensor(tokenizer(settings.text.read_text())["input_ids"][: settings.tokens])


def by_window(model, tokens, context):
    """The model's own outputs at every position whose next token is known: last hidden states [N, d], logits [N, C].

    The windows are those of all tokens; the last position of all is dropped.
    """
    outputs = [model(input_ids=window[None], output_hidden_states=True) for window in tokens.split(context)]
    hidden = torch.cat([output.hidden_states[-1][0] for output in outputs])
    logits = torch.cat([output.logits[0] for output in outputs])
    return hidden[:-1], logits[:-1]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_blocks_are_those_of_autograd_through_the_models_loss(kind, dtype, folders, text, tmp_path):
    """40 classes: the dense Hessian of the mean next-token loss with respect to the output layer's weight alone."""
    settings = HeadSettings(folders(kind), text, tokens=50, context=16, top=40, dtype=dtype)
    found = measure(tmp_path, settings)
    model, tokens = own_model(settings)
    weight = model.get_output_embeddings().weight.detach().clone()
    name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())

    def loss(head_weight):
        logits = [
            torch.func.functional_call(
                model, {f"{name}.weight": head_weight}, kwargs={"input_ids": window[None]}, tie_weights=False
            ).logits[0]
            for window in tokens.split(16)
        ]
        return functional.cross_entropy(torch.cat(logits)[:-1], tokens[1:])

    model.requires_grad_(False)
    hessian = torch.autograd.functional.hessian(loss, weight)
    blocks = hessian.square().sum(dim=(1, 3))
    top = torch.from_numpy(found["top_token"].to_numpy())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        torch.from_numpy(found["block_energy"].to_numpy()), blocks[top][:, top], rtol=tolerance, atol=0
    )
    torch.testing.assert_close(
        torch.from_numpy(found["class_energy"].to_numpy()), blocks.diag(), rtol=tolerance, atol=0
    )
    off = float(blocks.clone().fill_diagonal_(0).sum())
    energies = hs.OutputLayerEnergies.from_xarray(found)
    assert energies.off_diagonal == pytest.approx(off, rel=tolerance)
    assert energies.ratio == pytest.approx(off / float(blocks.trace()) / 39, rel=tolerance)
    assert found["loss"].mean() == pytest.approx(float(loss(weight)), rel=tolerance)
    assert found.attrs["bias"] == (kind == "phi")
    assert found.attrs["tied"] == (kind == "gpt2")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_trained_model_with_a_real_vocabulary(dtype, folders, text, tmp_path):
    """2000 tokens: dense blocks from the model's own hidden states and logits."""
    settings = HeadSettings(folders("trained"), text, tokens=150, top=12, dtype=dtype)
    found = measure(tmp_path, settings)
    model, tokens = own_model(settings)
    with torch.no_grad():
        h, logits = by_window(model, tokens, 64)
    p = torch.softmax(logits, dim=1)
    tolerance = TOLERANCE[dtype]
    outer = (h[:, :, None] * h[:, None, :]).flatten(1)
    diagonal = ((p * (1 - p)).T @ outer / 149).square().sum(dim=1)
    assert relative_error(found["class_energy"].to_numpy(), diagonal) < tolerance
    top = diagonal.argsort(descending=True)[:12]
    assert found["top_token"].to_numpy().tolist() == top.tolist()
    mixed = p[:, top, None] * (torch.eye(12) - p[:, None, top])
    blocks = (mixed.flatten(1).T @ outer / 149).square().sum(dim=1).reshape(12, 12)
    torch.testing.assert_close(torch.from_numpy(found["block_energy"].to_numpy()), blocks, rtol=tolerance, atol=0)
    assert relative_error(found["mean_probability"].to_numpy(), p.mean(dim=0)) < tolerance
    entropy = torch.distributions.Categorical(p).entropy()
    assert relative_error(found["entropy"].to_numpy(), entropy) < tolerance
    assert found["next_count"].to_numpy().tolist() == torch.bincount(tokens[1:], minlength=2000).tolist()
    assert found.attrs["samples"] == 149
    assert found.attrs["context"] == 64  # the model's positions
    # Trained: some tokens are far likelier than others, so that r is far above a random head's.
    assert found.attrs["ratio"] > 4 * found.attrs["random_ratio"]


def test_windows_of_one_token(folders, text, tmp_path):
    settings = HeadSettings(folders("llama"), text, tokens=20, context=1)
    features = torch.from_numpy(measure_features(tmp_path, settings)).double()
    model, tokens = own_model(settings)
    with torch.no_grad():
        expected = by_window(model, tokens, 1)[0]
    assert relative_error(features, expected) < 1e-5


def measure_features(out, settings):
    measure(out, settings)
    return xr.load_dataset(out / "results-features.nc")["feature"].to_numpy()


def test_stored_half_precision_is_measured_in_float32(folders, text, tmp_path):
    """The weights rounded to bfloat16, not the arithmetic."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folders("llama")
    AutoModelForCausalLM.from_pretrained(source).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "half")
    settings = HeadSettings(tmp_path / "half", text, tokens=30, context=30)
    found = measure(tmp_path / "out", settings)
    assert found.attrs["dtype"] == "float32"
    model, tokens = own_model(settings)
    with torch.no_grad():
        h, logits = by_window(model, tokens, 30)
    q = torch.softmax(logits, dim=1) * (1 - torch.softmax(logits, dim=1))
    diagonal = (q[:, :, None, None] * h[:, None, :, None] * h[:, None, None, :]).mean(dim=0).square().sum(dim=(1, 2))
    assert relative_error(found["class_energy"].to_numpy(), diagonal) < 1e-4


def test_the_output_layer_never_sees_all_positions(folders, text):
    """Logits of all positions are what does not fit for large vocabularies."""
    study = prepare_head(HeadSettings(folders("gpt2"), text, tokens=40))
    shapes = []
    study.model.model.lm_head.register_forward_hook(lambda module, inputs, logits: shapes.append(logits.shape))
    study.model.hidden_states(study.tokens, 16, lambda done, whole: None)
    assert shapes == [(1, 1, 40)] * 3


@pytest.mark.parametrize(
    ("kind", "words"),
    [("gemma2", "caps, scales or changes"), ("cohere", "caps, scales or changes"), ("bert", "sees later tokens")],
)
def test_models_with_another_hessian_are_refused(kind, words, folders, text):
    with pytest.raises(ModelError, match=words):
        prepare_head(HeadSettings(folders(kind), text, tokens=40))


def test_a_cap_far_above_the_models_own_logits_is_noticed(folders, text, tmp_path):
    """It changes these logits by a millionth, and the Hessian hardly, but another text may have larger ones."""
    model = shutil.copytree(folders("gemma2"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 2000.0}))
    with pytest.raises(ModelError, match="caps, scales or changes"):
        prepare_head(HeadSettings(model, text, tokens=40))
    (model / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": None}))
    prepare_head(HeadSettings(model, text, tokens=40))


def test_an_interrupted_run_continues_to_the_same_numbers(folders, text, tmp_path, monkeypatch):
    settings = HeadSettings(folders("gpt2"), text, tokens=40, context=16)
    study = prepare_head(settings)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(head, "_predictions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_head(study, head_store(tmp_path / "killed", settings), silent)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["results-features.nc"]
    with monkeypatch.context() as patch:
        patch.setattr(language_model.LanguageModel, "hidden_states", interrupted)  # not read again
        store = head_store(tmp_path / "killed", settings)
        assert run_head(study, store, silent) == 1
    xr.testing.assert_identical(store.require("head"), measure(tmp_path / "undisturbed", settings))


def test_results_are_found_again_only_for_the_same_model_text_and_settings(folders, text, tmp_path):
    model = shutil.copytree(folders("gpt2"), tmp_path / "model")
    own_text = tmp_path / "text.txt"
    own_text.write_text(text.read_text())
    settings = HeadSettings(model, own_text)

    def key(changed=settings):
        return head_store(tmp_path / "out", changed).settings

    first = key()
    assert key() == first
    keys = {first}
    for change in ({"tokens": 30}, {"context": 16}, {"top": 3}, {"dtype": "float64"}):
        keys.add(key(dataclasses.replace(settings, **change)))
    own_text.write_text(text.read_text() + "x")
    keys.add(key())
    config = model / "config.json"
    config.write_text(config.read_text() + "\n")
    keys.add(key())
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    keys.add(key())
    assert len(keys) == 8


def test_large_weight_files_count_by_size_and_time(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "HASHED", 1000)
    model = shutil.copytree(folders("gpt2"), tmp_path / "model")
    first = language_model.model_fingerprint(model)
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert language_model.model_fingerprint(model) != first


def test_too_many_samples_for_memory_say_so(folders, text, monkeypatch):
    from hesscope.core import memory

    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 2**20)
    with pytest.raises(TooLargeError, match="use fewer --tokens instead"):
        prepare_head(HeadSettings(folders("gpt2"), text))


def test_texts_of_tokens(folders):
    model = language_model.load_language_model(folders("trained"), torch.float32)
    pieces = model.tokenizer.convert_tokens_to_ids
    assert model.token_text(pieces("Ġself")) == "␣self"
    assert model.token_text(pieces("Ċ")) == "\\n"
    assert model.token_text(pieces("Ã")) == "Ã"  # the byte 0xC3 alone is no character: the piece's name
    assert model.token_text(pieces("<|endoftext|>")) == "<|endoftext|>"
    assert model.token_text(5000) == "#5000"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("\n" + 15 * " ", "\\n␣×15"),
        ("a\\n", "a\\\\n"),
        ("   ", "␣␣␣"),
        ("\x00\u200b", "\\x00\\u200b"),
    ],
)
def test_invisible_characters_are_shown(text, shown):
    assert visible(text) == shown


def test_tokens_do_not_depend_on_how_much_text_follows(folders):
    model = language_model.load_language_model(folders("trained"), torch.float32)
    whole = model.tokenizer(library_text())["input_ids"]
    for count in (2, 5, 77, 1000):
        assert model.tokens(library_text(), count).tolist() == whole[:count]
    assert (
        model.tokens(500 * " " + "\nimport re", 20).tolist()
        == model.tokenizer(500 * " " + "\nimport re")["input_ids"][:20]
    )


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path, text):
    model = shutil.copytree(folders("gpt2"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders("trained") / name, model / name)
    with pytest.raises(InputError, match="they do not belong together"):
        prepare_head(HeadSettings(model, text))

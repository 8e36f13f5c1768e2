"""Small causal language models as transformers saves them, with tokenizers made from Python's own library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

VOCABULARY = 2000
POSITIONS = 64
CHARACTERS = 40


def library_text():
    """Real text that every Python has: the source of argparse."""
    return Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")


def byte_pairs(text, size=VOCABULARY):
    """A byte-level BPE tokenizer trained on the text, of GPT-2's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[end], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def characters(text, size=CHARACTERS):
    """One token for each of the most frequent characters, and one for all others."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    frequent = sorted(set(text), key=text.count, reverse=True)[: size - 1]
    vocabulary = {token: number for number, token in enumerate(["<unk>", *frequent])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def new_model(kind, size, width=16):
    """An untrained model of one of several architectures, with everything random, biases too.

    "gpt2": tied, no bias; "llama": untied, no bias; "phi": untied, with bias; "gemma2": logits capped; "cohere": logits
    scaled; "bert": not causal.
    """
    import transformers as hf

    common = {
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "gpt2":
        config = hf.GPT2Config(
            vocab_size=size, n_embd=width, n_layer=2, n_head=2, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0
        )
        model = hf.GPT2LMHeadModel(config)
    elif kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**common, num_key_value_heads=1, tie_word_embeddings=False))
    elif kind == "phi":
        model = hf.PhiForCausalLM(hf.PhiConfig(**common))
    elif kind == "gemma2":
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**common, num_key_value_heads=1, head_dim=width // 2))
    elif kind == "cohere":
        model = hf.CohereForCausalLM(hf.CohereConfig(**common))
    else:
        model = hf.BertForMaskedLM(hf.BertConfig(**common))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def folder_of(factory, name):
    """Folder with a model and its tokenizer: "trained", or a kind of `new_model`; made once a session.

    factory: pytest's tmp_path_factory.
    """
    folder = factory.getbasetemp() / "models" / name
    if not folder.exists():
        model, tokenizer = trained() if name == "trained" else untrained(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def untrained(kind):
    """A random model over single characters."""
    tokenizer = characters(library_text())
    return new_model(kind, len(tokenizer)), tokenizer


def trained():
    """A GPT-2 of 2 layers trained for a few seconds on the text, over a real BPE vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    text = library_text()
    tokenizer = byte_pairs(text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        starts = torch.randint(len(ids) - POSITIONS, (4,)).tolist()
        batch = torch.stack([ids[start : start + POSITIONS] for start in starts])
        logits = model(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, tokenizer

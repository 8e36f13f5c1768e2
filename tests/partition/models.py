"""Small networks of every architecture whose partitions are tested, random in every parameter, in float64."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers import F64, randint, randn, randomized

WIDTH, TOKENS, VOCABULARY = 16, 5, 11
QUERIES, KEYS = 4, 2

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": QUERIES,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": KEYS}
EXPERTS = {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": QUERIES,
    "n_positions": 16,
    "bos_token_id": 0,
}
IMAGES = {"image_size": 4, "patch_size": 2, "num_channels": 1}

# architecture -> (name of the model in transformers, name of its configuration, arguments of that)
CAUSAL = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "eos_token_id": 0}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": False}),
    "llama with biases": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "attention_bias": True}),
    "llama, wide heads": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "head_dim": 6}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 3}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 6, "decoder_sparse_step": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 4}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 4}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, "head_dim": 4, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "opt": ("OPTForCausalLM", "OPTConfig", {**COMMON, "ffn_dim": 12, "word_embed_proj_dim": WIDTH}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON),
    "bert": ("BertForMaskedLM", "BertConfig", COMMON),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", COMMON),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 12, "n_layers": 2, "n_heads": QUERIES},
    ),
}
VISION = {
    "vit": ("ViTModel", "ViTConfig", {**COMMON, **IMAGES}),
    "deit": ("DeiTModel", "DeiTConfig", {**COMMON, **IMAGES}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**COMMON, **IMAGES}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {**COMMON, **IMAGES}),
}


def _transformer(model, config, arguments):
    import transformers as hf

    made = getattr(hf, config)(**arguments)
    made._experts_implementation = "eager"  # the fused one knows no float64
    return getattr(hf, model)(made)


class Called(nn.Module):
    """A network with the input it is tried on; call without arguments for its first output."""

    def __init__(self, network, inputs):
        super().__init__()
        self.network = network
        self.inputs = inputs

    def forward(self):
        outputs = self.network(**self.inputs) if isinstance(self.inputs, dict) else self.network(*self.inputs)
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def tokens():
    return randint(VOCABULARY, 2, TOKENS, seed=1)


class CrossAttention(nn.Module):
    """GPT-2's attention to another sequence."""

    def __init__(self):
        super().__init__()
        from transformers import GPT2Config
        from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

        self.attention = GPT2Attention(GPT2Config(**GPT2, eos_token_id=0), is_cross_attention=True, layer_idx=0)
        self.attention.config._attn_implementation = "eager"

    def forward(self, x, other):
        return self.attention(x, encoder_hidden_states=other)[0]


class Bloom(nn.Module):
    """Bloom's attention with one slope for all heads: its own differ, so that heads cannot be swapped by parameters."""

    def __init__(self):
        super().__init__()
        from transformers import BloomConfig
        from transformers.models.bloom.modeling_bloom import BloomAttention

        config = BloomConfig(hidden_size=WIDTH, n_head=QUERIES, hidden_dropout=0.0, attention_dropout=0.0)
        self.attention = BloomAttention(config, layer_idx=0)

    def forward(self, x):
        alibi = torch.arange(TOKENS, dtype=F64).expand(2 * QUERIES, 1, TOKENS)
        return self.attention(x, torch.zeros_like(x), alibi, torch.zeros(2, 1, TOKENS, TOKENS, dtype=F64))[0]


class Block(nn.Module):
    """A user's own attention: queries of all heads, then keys, then values; no type that anyone knows."""

    def __init__(self, width=WIDTH, interleaved=False):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.interleaved = interleaved

    def forward(self, x):
        shape, roles = ((QUERIES, 3), 3) if self.interleaved else ((3, QUERIES), 2)
        q, k, v = self.qkv(x).unflatten(-1, (*shape, -1)).movedim(roles, 0)
        scores = torch.einsum("nthd,nshd->nhts", q, k).softmax(dim=-1)
        return self.norm(x + self.project(torch.einsum("nhts,nshd->nthd", scores, v).flatten(2)))


class Stack(nn.Module):
    """Blocks of a user's own between an embedding and a head that share one matrix."""

    def __init__(self, interleaved=False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(interleaved=interleaved) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    """A ResNet's block, with a shortcut that is a list of its own."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out)
        self.conv2, self.bn2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, groups=2), nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.layer1 = nn.Sequential(Residual(2, 4), Residual(4, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.layer1(self.stem(x)).mean(dim=(2, 3)))


def _encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, QUERIES, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _bart():
    from transformers import BartConfig, BartModel

    heads = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 12))}
    heads |= {"encoder_attention_heads": QUERIES, "decoder_attention_heads": QUERIES}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    return BartModel(BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, max_position_embeddings=16, **heads, **tokens))


def _sequence(seed):
    return randn(2, TOKENS, WIDTH, seed=seed)


# name -> function that makes the network, and what to call it with
OTHERS = {
    "encoder": (_encoder, lambda: (_sequence(1),)),
    "multihead, separate": (
        lambda: nn.MultiheadAttention(WIDTH, QUERIES, kdim=6, vdim=7, batch_first=True),
        lambda: (_sequence(1), randn(2, 3, 6, seed=2), randn(2, 3, 7, seed=3)),
    ),
    "gpt2, crossed": (CrossAttention, lambda: (_sequence(1), _sequence(2))),
    "bloom": (Bloom, lambda: (_sequence(1),)),
    "bart": (_bart, lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()}),
    "own": (Stack, lambda: (tokens(),)),
    "own, interleaved": (lambda: Stack(interleaved=True), lambda: (tokens(),)),
    "resnet": (ResNet, lambda: (randn(2, 1, 6, 6, seed=1),)),
}
NAMES = (*CAUSAL, *VISION, *OTHERS)


def build(name):
    """A network with its input, in float64 and evaluation mode."""
    if name in CAUSAL:
        network, inputs = _transformer(*CAUSAL[name]), {"input_ids": tokens()}
    elif name in VISION:
        network, inputs = _transformer(*VISION[name]), {"pixel_values": randn(2, 1, 4, 4, seed=1)}
    else:
        network, inputs = OTHERS[name][0](), OTHERS[name][1]()
    return Called(randomized(network.eval(), scale=0.4), inputs)

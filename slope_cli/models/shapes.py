"""The model shapes: published configurations, the models transformers builds from them, and their pretraining loss.

Every model is one of transformers' own classes, so that `save_pretrained`, `generate` and lm-eval work on what was
trained. The linear layers in them are transformers' `Conv1D` in GPT-2 (weight (in, out)) and `nn.Linear` elsewhere.

Shape suffixes: B sequences, T positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

from slope_cli.errors import UsageError, did_you_mean

FamilyName = Literal["gpt2", "opt", "bert", "llama", "mistral"]
Objective = Literal["causal", "masked"]


@dataclass(frozen=True)
class Family:
    """What the shapes of one architecture share: transformers' class names, and how it spells its settings."""

    config_class: str
    model_class: str
    sizes: tuple[str, ...]
    dropouts: tuple[str, ...]
    positions: str
    activation: str
    # A learned position table is a parameter that can be made longer; rotary positions are not trained, so a longer
    # sequence needs another rope, which is the user's decision.
    learned_positions: bool
    objective: Objective = "causal"


@dataclass(frozen=True)
class Shape:
    """One named model: its family, and the keyword arguments of the transformers config."""

    family: FamilyName
    config: Mapping[str, Any]


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_LLAMA_SIZES = (*_SIZES, "intermediate_size", "num_key_value_heads", "head_dim")

FAMILIES: dict[FamilyName, Family] = {
    "gpt2": Family(
        config_class="GPT2Config",
        model_class="GPT2LMHeadModel",
        sizes=("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        positions="n_positions",
        activation="activation_function",
        learned_positions=True,
    ),
    "opt": Family(
        config_class="OPTConfig",
        model_class="OPTForCausalLM",
        sizes=(*_SIZES, "ffn_dim", "word_embed_proj_dim"),
        dropouts=("dropout", "attention_dropout"),
        positions="max_position_embeddings",
        activation="activation_function",
        learned_positions=True,
    ),
    "bert": Family(
        config_class="BertConfig",
        model_class="BertForPreTraining",
        sizes=(*_SIZES, "intermediate_size", "type_vocab_size"),
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        positions="max_position_embeddings",
        activation="hidden_act",
        learned_positions=True,
        objective="masked",
    ),
    "llama": Family(
        config_class="LlamaConfig",
        model_class="LlamaForCausalLM",
        sizes=_LLAMA_SIZES,
        dropouts=("attention_dropout",),
        positions="max_position_embeddings",
        activation="hidden_act",
        learned_positions=False,
    ),
    "mistral": Family(
        config_class="MistralConfig",
        model_class="MistralForCausalLM",
        sizes=(*_LLAMA_SIZES, "sliding_window"),
        dropouts=("attention_dropout",),
        positions="max_position_embeddings",
        activation="hidden_act",
        learned_positions=False,
    ),
}


def _gpt2(width: int, layers: int, heads: int, **more: Any) -> Shape:
    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": layers, "n_head": heads}
    return Shape("gpt2", {**sizes, **more})


def _sizes(vocabulary: int, positions: int, width: int, layers: int, heads: int) -> dict[str, Any]:
    return dict(zip(_SIZES, (vocabulary, width, layers, heads, positions), strict=True))


def _opt(width: int, layers: int, heads: int, **more: Any) -> Shape:
    sizes = _sizes(50272, 2048, width, layers, heads)
    # The published pad_token_id 1 makes the embedding drop that row's gradient. Token files hold no padding, and in
    # any other tokenizer than OPT's own id 1 is a real token (GPT-2's is the quotation mark).
    return Shape("opt", {**sizes, "ffn_dim": 4 * width, "pad_token_id": None, **more})


def _bert(width: int, layers: int, heads: int) -> Shape:
    return Shape("bert", {**_sizes(30522, 512, width, layers, heads), "intermediate_size": 4 * width})


# The decoder that Llama 3 8B and Mistral 7B have in common.
_GROUPED_4096 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
_GROUPED_8192 = {
    **_GROUPED_4096,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

SHAPES: dict[str, Shape] = {
    # Bytes and one end-of-text id, 257 in all, padded to a multiple of 16.
    "gpt2-nano": _gpt2(
        128,
        4,
        4,
        vocab_size=272,
        n_positions=256,
        bos_token_id=256,
        eos_token_id=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gpt2-small": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "opt-125m": _opt(768, 12, 12),
    # Unlike the rest of its family: norms after the residual sum, embeddings of width 512 projected up and down.
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "llama3-8b": Shape("llama", {**_GROUPED_4096, **_LLAMA3}),
    "llama3-70b": Shape("llama", {**_GROUPED_8192, **_LLAMA3}),
    "mistral-7b": Shape(
        "mistral",
        {
            **_GROUPED_4096,
            "vocab_size": 32768,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_window": None,
        },
    ),
}


def kv_heads(shape: PreTrainedConfig) -> int:
    """The heads of keys and values, which may be fewer than those of queries."""
    return int(getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)


def objective(config: PreTrainedConfig) -> Objective:
    """The pretraining objective of models of this config: causal unless its family here says otherwise."""
    family = FAMILIES.get(config.model_type)
    return family.objective if family else "causal"


def shape_of(name: str) -> Shape:
    """The shape of a name; UsageError with the nearest names if there is none."""
    if name not in SHAPES:
        raise UsageError(f"unknown model {name!r}; {did_you_mean(name, sorted(SHAPES))}")
    return SHAPES[name]


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config; UsageError if it is not supported."""
    if config.model_type not in FAMILIES:
        raise UsageError(f"model type {config.model_type!r} is not supported; it must be one of {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def drops(config: PreTrainedConfig) -> bool:
    """Whether a model drops anything in training."""
    return any(getattr(config, name, 0.0) for name in family_of(config).dropouts)

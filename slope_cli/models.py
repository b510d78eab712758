"""The model shapes: published configurations, the models transformers builds from them, and their pretraining loss.

Every model is one of transformers' own classes, so that `save_pretrained`, `generate` and lm-eval work on what was
trained. The linear layers in them are transformers' `Conv1D` in GPT-2 (weight (in, out)) and `nn.Linear` elsewhere.

Shape suffixes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from slope_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

FamilyName = Literal["gpt2", "opt", "bert", "llama", "mistral"]
Objective = Literal["causal", "masked"]
CrossEntropy = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]

IGNORED_LABEL = -100
ROWS_AT_ONCE = 4096


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

    @property
    def objective(self) -> Objective:
        """What the shape is pretrained on."""
        return FAMILIES[self.family].objective


class Loss(NamedTuple):
    """The loss of one batch, three scalars on the model's device.

    total: float32, what to call backward on. token_loss: float32, detached, the mean cross-entropy in nats of the
    predicted tokens, of which perplexity is the exponential. targets: int64, how many tokens that mean is over.
    """

    total: Tensor
    token_loss: Tensor
    targets: Tensor


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


def _opt(width: int, layers: int, heads: int, **more: Any) -> Shape:
    sizes = {
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "hidden_size": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    # The published pad_token_id 1 makes the embedding drop that row's gradient. Token files hold no padding, and in
    # any other tokenizer than OPT's own id 1 is a real token (GPT-2's is the quotation mark).
    return Shape("opt", {**sizes, "pad_token_id": None, **more})


def _bert(width: int, layers: int, heads: int) -> Shape:
    sizes = {
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return Shape("bert", sizes)


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
    # The odd one of its family: norms after the residual sum, embeddings of width 512 projected up and down.
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


def model_config(
    name: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    seq_len: int | None = None,
    dropout: float | None = None,
) -> PreTrainedConfig:
    """The transformers config of the shape `name`, with attention through `scaled_dot_product_attention`.

    overrides: settings of the family's transformers config, which win over `dropout`. Special token ids that an
    overridden vocabulary does not hold are set to None, unless they are overridden too. seq_len: makes a learned
    position table longer if it must be. dropout: the value of every dropout of the family.

    Raises UsageError for an unknown name or setting, a value of the wrong type, sizes that do not fit together, and a
    seq_len that the positions cannot hold.
    """
    import transformers

    shape = _shape(name)
    family = FAMILIES[shape.family]
    config_class = getattr(transformers, family.config_class)
    changes = _canonical(name, config_class, overrides or {})
    settings: dict[str, Any] = {**shape.config, **changes}
    if isinstance(changes.get("rope_parameters"), Mapping):
        # Merged, since transformers would silently put its own default for a rope_theta that is left out.
        settings["rope_parameters"] = {**shape.config["rope_parameters"], **changes["rope_parameters"]}
    if dropout is not None:
        settings |= {field: changes.get(field, dropout) for field in family.dropouts}
    settings[family.positions] = _positions(name, family, settings, seq_len, fixed=family.positions in changes)
    _check_values(name, family, settings)
    _fit_special_ids(name, config_class, settings, changes)
    config = _construct(name, config_class, settings)
    _check_heads(name, config)
    return config


def build_model(config: PreTrainedConfig, *, device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """The float32 model of `config` in training mode, its weights a function of `config` and `seed` alone.

    Weights are drawn on the CPU and then moved, so that every device and every rank starts from the same ones. On
    "meta" nothing is drawn or allocated: under a second for any shape. The global random state stays as it was.

    Raises UsageError if the config is not of one of the families here.
    """
    import torch
    import transformers

    model_class = getattr(transformers, _family(config).model_class)
    # torch.manual_seed would also reseed every GPU, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)
        model = model_class(config)
    return model if device == "meta" else model.to(device)


def objective(config: PreTrainedConfig) -> Objective:
    """What models of this config are pretrained on; UsageError if it is of none of the families here."""
    return _family(config).objective


def vocab_size(config: PreTrainedConfig) -> int:
    """Rows of the embedding table: token ids run from 0 up to, not including, this."""
    return int(config.vocab_size)


def max_seq_len(config: PreTrainedConfig) -> int:
    """The longest sequence the positions hold."""
    return int(config.max_position_embeddings)


def width(config: PreTrainedConfig) -> int:
    """Features of the residual stream."""
    return int(config.hidden_size)


def batch_loss(
    model: Callable[..., Any],
    batch: Mapping[str, Tensor],
    objective: Objective,
    cross_entropy: CrossEntropy | None = None,
) -> Loss:
    """The pretraining loss of one batch, computed in float32 without waiting for the device.

    model: a model of `build_model`, or a wrapper that forwards to it (DDP, torch.compile).
    batch, all int64: input_ids (B, T); labels (B, T), -100 where nothing is predicted. For "causal" labels are already
    shifted: labels[b, t] is the token after input_ids[b, t]. For "masked" token_type_ids and attention_mask (B, T) are
    passed on if there, and the mean cross-entropy of next_sentence_label (B,) is added if there.

    A batch without any target has token_loss 0. cross_entropy: `token_cross_entropy`, or a compiled one.
    """
    cross_entropy = cross_entropy or token_cross_entropy
    if objective == "causal":
        with _unpadded(model):
            logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits
        token_loss, targets = cross_entropy(logits_BTV, batch["labels"])
        return Loss(token_loss, token_loss.detach(), targets)
    return _masked_loss(model, batch, cross_entropy)


def _masked_loss(model: Callable[..., Any], batch: Mapping[str, Tensor], cross_entropy: CrossEntropy) -> Loss:
    from torch.nn import functional as F

    inputs = {key: batch[key] for key in ("input_ids", "token_type_ids", "attention_mask") if key in batch}
    with _unpadded(model) if "attention_mask" not in batch else contextlib.nullcontext():
        output = model(**inputs)
    token_loss, targets = cross_entropy(output.prediction_logits, batch["labels"])
    if "next_sentence_label" not in batch:
        return Loss(token_loss, token_loss.detach(), targets)
    sentence_loss = F.cross_entropy(output.seq_relationship_logits.float(), batch["next_sentence_label"])
    return Loss(token_loss + sentence_loss, token_loss.detach(), targets)


@contextlib.contextmanager
def _unpadded(model: Any) -> Iterator[None]:
    """Within it, attention gets no mask tensor, only its flag: right for batches without padding.

    transformers builds a mask tensor wherever it sees a compiler or a CUDA graph at work, which rules out the fused
    attention kernels. For an attention function without a mask function of its own it builds none.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_unpadded", sdpa_attention_forward)
    before, model.config._attn_implementation = model.config._attn_implementation, "sdpa_unpadded"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def token_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy in nats over labels other than -100, float32, and their number, int64; both scalars."""
    import torch
    from torch.nn import functional as F

    # Unlabelled rows are not indexed away: a shape that depends on the data would make the host wait for the device.
    targets = (labels_BT != IGNORED_LABEL).sum()
    rows_V, labels = logits_BTV.flatten(0, 1), labels_BT.flatten()
    # Where there is no gradient to make, the float32 copy of the logits need not be there as a whole.
    size = len(labels) if torch.is_grad_enabled() else ROWS_AT_ONCE
    parts = (slice(start, start + size) for start in range(0, len(labels), size))
    losses = [
        F.cross_entropy(rows_V[part].float(), labels[part], ignore_index=IGNORED_LABEL, reduction="sum")
        for part in parts
    ]
    summed = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return summed / targets.clamp(min=1), targets


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise UsageError(f"unknown model {name!r}{_suggestion(name, SHAPES)}")
    return SHAPES[name]


def _family(config: PreTrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise UsageError(f"model type {config.model_type!r} is not supported; it must be one of {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def _suggestion(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(names)}"


def _canonical(name: str, config_class: type, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides under the family's own field names: GPT-2, for one, takes hidden_size for n_embd."""
    # Only the family's own fields: those of the base class (dtype, return_dict, …) do not shape the model, and setting
    # one would do nothing or break the loss.
    own = {field for field in inspect.get_annotations(config_class) if not field.startswith("_")}
    aliases: Mapping[str, str] = getattr(config_class, "attribute_map", {})
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        field = aliases.get(key, key)
        if field not in own:
            raise UsageError(f"model {name} has no setting {key!r}{_suggestion(key, own | set(aliases))}")
        if field in changes:
            raise UsageError(f"model {name}: {key} is another name of {field}, and both are set; keep one")
        changes[field] = value
    return changes


def _positions(name: str, family: Family, settings: Mapping[str, Any], seq_len: int | None, *, fixed: bool) -> Any:
    table = settings[family.positions]
    if seq_len is not None and seq_len < 1:
        raise UsageError(f"model {name}: seq_len must be at least 1, not {seq_len}")
    if seq_len is None or not isinstance(table, int) or seq_len <= table:
        return table
    if fixed or not family.learned_positions:
        raise UsageError(
            f"model {name}: seq_len {seq_len} is longer than {family.positions} {table}; "
            f"lower train.seq_len or set model.overrides.{family.positions} to at least {seq_len}"
        )
    return seq_len


def _check_values(name: str, family: Family, settings: Mapping[str, Any]) -> None:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for field in family.sizes:
        size = settings.get(field)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UsageError(f"model {name}: {field} must be a whole number of at least 1, not {size!r}")
    for field in family.dropouts:
        rate = settings.get(field, 0.0)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise UsageError(f"model {name}: {field} must be a number from 0 up to, not including, 1, not {rate!r}")
    activation = str(settings.get(family.activation, "relu"))
    if activation not in ACT2FN:
        raise UsageError(f"model {name}: unknown {family.activation} {activation!r}{_suggestion(activation, ACT2FN)}")
    rope = settings.get("rope_parameters") or {}
    rope_types = {"default", *ROPE_INIT_FUNCTIONS}
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") not in rope_types:
        raise UsageError(
            f"model {name}: unknown rope_type {rope['rope_type']!r}; known are {', '.join(sorted(rope_types))}"
        )


def _fit_special_ids(name: str, config_class: type, settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    rows = settings["vocab_size"]
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = settings.get(field, getattr(config_class, field, None))
        ids = token if isinstance(token, list) else [token]
        if all(not isinstance(value, int) or 0 <= value < rows for value in ids):
            continue
        if field in changes:
            raise UsageError(f"model {name}: {field} {token} is outside the vocabulary of {rows}")
        settings[field] = None


def _construct(name: str, config_class: type, settings: dict[str, Any]) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError

    try:
        # A copy: transformers completes rope_parameters in place, which would write into SHAPES.
        return config_class(**copy.deepcopy(settings), attn_implementation="sdpa")
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        # huggingface_hub says where it found the fault on the first line and "TypeError: what is wrong" on the last.
        reason = (str(error).strip() or repr(error)).splitlines()[-1].strip(' "')
        raise UsageError(f"model {name}: {reason.removeprefix('TypeError: ').removeprefix('ValueError: ')}") from error


def _check_heads(name: str, config: PreTrainedConfig) -> None:
    heads = config.num_attention_heads
    if config.hidden_size % heads:
        raise UsageError(f"model {name}: {heads} attention heads do not divide the width {config.hidden_size}")
    groups = getattr(config, "num_key_value_heads", heads)
    if heads % groups:
        raise UsageError(f"model {name}: num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    if hasattr(config, "rope_parameters") and config.head_dim % 2:
        raise UsageError(f"model {name}: rotary positions need an even head_dim, not {config.head_dim}")


def autocast(device: torch.device) -> torch.autocast:
    """What a trained model is judged and tuned in: bf16 on a GPU, its own precision elsewhere."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

"""transformers' configs and models of the named shapes."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import sparse_kernels.transformers  # noqa: F401  the import lets transformers make the activation sparse_relu2
from slope_cli.config.schema import Config, ModelConfig
from slope_cli.errors import UsageError, did_you_mean
from slope_cli.models.shapes import FAMILIES, Family, family_of, shape_of
from sparse_kernels.layers import layer_seed

LARGEST = 1 << 28
"""Of any size of a model: the bytes of a weight of such sides can still be counted in 64 bits."""


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
    shape = shape_of(name)
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


def run_model_config(config: Config) -> PreTrainedConfig:
    """transformers' config of a run's model; UsageError for sizes that do not fit."""
    m = config.model
    overrides = m.overrides if m.activation is None or config.linearizes else _with_activation(m)
    return model_config(m.name, overrides=overrides, seq_len=config.train.seq_len, dropout=m.dropout)


def _with_activation(m: ModelConfig) -> dict[str, Any]:
    """The overrides of a model whose activation is set; UsageError for one that has another kind of MLP."""
    family = shape_of(m.name).family
    if family not in ("gpt2", "opt"):
        raise UsageError(f"model.activation={m.activation}: is for GPT-2 and OPT, and {m.name} is neither")
    field = FAMILIES[family].activation
    if field in m.overrides:
        raise UsageError(f"model.activation={m.activation}: model.overrides.{field} is set, too; keep one")
    return {**m.overrides, field: m.activation}


def build_model(config: PreTrainedConfig, *, device: str = "cpu", seed: int | None = 0) -> PreTrainedModel:
    """The float32 model of `config` in training mode, its weights a function of `config` and `seed` alone.

    Weights are drawn on the CPU and then moved, so that every device and every rank starts from the same ones; a
    generator for each block lets threads draw blocks at once. On "meta" nothing is drawn or allocated: under a second
    for any shape. The global random state stays as it was.

    seed: None for a model whose weights are then read: they are zeros, instead of drawn.

    Raises UsageError if the config is not of one of the families here.
    """
    model_class = getattr(transformers, family_of(config).model_class)
    place = "meta" if device == "meta" else "cpu"
    with torch.device(place), _Draws(None):
        model = model_class(config)
    if place == "meta":
        return model
    if seed is not None:
        _draw(model, seed)
    return model.to(device)


class _Draws(TorchFunctionMode):
    """Within it, torch.nn.init draws from a generator; without one, it sets zeros, which takes no time."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return func(*args, **kwargs)
        if self._generator is None:
            return nn.init.zeros_(kwargs["tensor"] if "tensor" in kwargs else args[0])
        return func(*args, **{**kwargs, "generator": self._generator})


def _draw(model: PreTrainedModel, seed: int) -> None:
    """Draw all weights by the model's own rules; first each block's, and then the others'."""
    blocks = list(transformer_blocks(model))
    inner = {module for block in blocks for module in block.modules()}
    parts = [list(block.modules()) for block in blocks] + [[m for m in model.modules() if m not in inner]]

    def draw(part: int) -> None:
        generator = torch.Generator().manual_seed(layer_seed(seed, str(part)))
        with _Draws(generator):
            for module in reversed(parts[part]):  # a module may draw its children's weights anew
                model._init_weights(module)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(len(blocks))))
    draw(len(blocks))


def transformer_blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The blocks of a model: the entries of its first module list."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(lists, ())


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
            hint = did_you_mean(key, sorted(own | set(aliases)))
            raise UsageError(f"model {name} has no setting {key!r}; {hint}")
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
    for field in family.sizes:
        size = settings.get(field)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UsageError(f"model {name}: {field} must be a whole number of at least 1, not {size!r}")
        if size is not None and size > LARGEST:
            raise UsageError(f"model {name}: {field} must be at most {LARGEST}, not {size}")
    for field in family.dropouts:
        rate = settings.get(field, 0.0)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise UsageError(f"model {name}: {field} must be a number from 0 up to, not including, 1, not {rate!r}")
    activation = str(settings.get(family.activation, "relu"))
    if activation not in ACT2FN:
        hint = did_you_mean(activation, sorted(ACT2FN))
        raise UsageError(f"model {name}: unknown {family.activation} {activation!r}; {hint}")
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
        # huggingface_hub names the faulty field on the first line, and "TypeError: REASON" on the last.
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

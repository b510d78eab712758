"""Linearized attention inside transformers' own models: put in, taken out, switched, saved.

Every supported architecture calls one attention function with (module, q, k, v, mask, scaling) after positions are
embedded, and updates its cache just before. So the function here serves all of them: if the attention module has a
`linear`, a LinearWindow, that computes the output; otherwise softmax attention does, as before. A pre-forward hook of
each module puts LinearWindow's own layer into a cache that is still empty.

Shape suffixes: B sequences, H query heads, G KV heads, T queries, S keys, D head dimension.
"""

import contextlib
import copy
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.import_utils import is_tracing

from slope_cli.config.methods import LinearizeConfig, layer_and_head
from slope_cli.errors import UsageError
from slope_cli.linearize.cache import LinearWindowCache, of_kv_heads
from slope_cli.linearize.linear_attention import BRANCHES, Branch
from slope_cli.linearize.linear_window import LinearWindow, Mode
from slope_cli.models import shapes

NAME = "slope_linear"
"""The attention implementation's name in transformers' registries."""

PROJECTIONS = {
    "q": r"\.(q_proj|query|attn\.c_attn)$",
    "k": r"\.(k_proj|key|attn\.c_attn)$",
    "v": r"\.(v_proj|value|attn\.c_attn)$",
    "o": r"\.(o_proj|out_proj|attn\.c_proj|attention\.output\.dense)$",
}
"""Names of the layers that compute q, k and v, and that read attention's output; GPT-2's c_attn computes all three."""


def linearize_attention(
    model: PreTrainedModel, config: LinearizeConfig, *, seed: int = 0, device: torch.device | str | None = None
) -> list[str]:
    """Linearize each attention layer but those of config.kept, in place, and in each all KV heads but those listed.

    What is added is trainable and in float32: a `linear` in each attention module. Nothing of the model is frozen,
    changed or moved, so `restore_attention` gives back the model as it was. Attention dropout does not reach
    linearized layers.

    Args:
        seed: of the entries of a feature map's W that do not start as the identity.
        device: where what is added lies; None for that of each attention module.

    Returns:
        The names of the attention modules, in order.

    Raises:
        UsageError: a family that is not supported, a model that is linearized already, settings that do not fit.
    """
    causal = shapes.family_of(model.config).objective == "causal"
    modules = _attention_modules(model)
    if any(isinstance(getattr(module, "linear", None), LinearWindow) for _, module in modules):
        raise UsageError("the model is linearized already")
    if causal != all(module.is_causal for _, module in modules):
        raise UsageError(f"{type(model).__name__}: attention both causal and two-sided is not supported")
    _check(config, len(modules), shapes.kv_heads(model.config), causal=causal)
    _check_reach(config, model)
    generator = torch.Generator().manual_seed(seed)
    before = model.config._attn_implementation
    swapped = []
    for index, (name, module) in enumerate(modules):
        if index in config.kept:
            continue
        _add_linear_window(module, config, causal=causal, generator=generator, before=before, device=device)
        swapped.append(name)
    # The model's own setting decides which mask is made: the plain one of padding.
    model.config._attn_implementation = NAME
    keep_softmax(model, config.listed)
    return swapped


def restore_attention(model: PreTrainedModel, layers: Collection[int] | None = None) -> list[str]:
    """The inverse of `linearize_attention`: softmax attention again, and nothing left of what was added.

    Args:
        layers: of these alone, from 0; None for all.

    Returns:
        The names of the attention modules that were linearized.
    """
    names, before = [], model.config._attn_implementation
    for index, (name, module) in enumerate(_attention_modules(model)):
        linear = getattr(module, "linear", None)
        if isinstance(linear, LinearWindow) and (layers is None or index in layers):
            if linear.hook is not None:
                linear.hook.remove()
            module.config, before = linear.softmax_config, linear.softmax_name
            del module.linear
            names.append(name)
    if not linear_windows(model):
        model.config._attn_implementation = before
    return names


def keep_softmax(model: PreTrainedModel, kept: Iterable[int | str]) -> None:
    """Give layers of a linearized model softmax attention again, or KV heads of them alone, in place.

    A layer all of whose heads are kept is as before it was linearized.

    Args:
        kept: layers from 0, and KV heads as "3/1", head 1 of layer 3.
    """
    whole = []
    for layer, (linear, heads) in _kept_windows(model, kept).items():
        linear.softmax_heads = tuple(sorted(heads))
        whole += [layer] if len(heads) in (0, linear.kv_heads) else []
    restore_attention(model, whole)


def _kept_windows(model: PreTrainedModel, kept: Iterable[int | str]) -> dict[int, tuple[LinearWindow, list[int]]]:
    """What `keep_softmax` is given: each linearized layer, and its heads; none for all of it."""
    windows = {layer: getattr(module, "linear", None) for layer, (_, module) in enumerate(_attention_modules(model))}
    found: dict[int, tuple[LinearWindow, list[int]]] = {}
    for entry in kept:
        layer, head = layer_and_head(entry)
        if isinstance(linear := windows.get(layer), LinearWindow):
            found.setdefault(layer, (linear, []))[1].extend([] if head is None else [head])
    return found


@contextlib.contextmanager
def softmax_in(model: PreTrainedModel, kept: Iterable[int | str]) -> Iterator[None]:
    """Within it, these layers or heads of a linearized model have softmax attention."""
    windows = _kept_windows(model, kept).values()
    before = [(linear, linear.mode, linear.softmax_heads) for linear, _ in windows]
    try:
        for linear, heads in windows:
            some = 0 < len(heads) < linear.kv_heads
            linear.mode, linear.softmax_heads = (linear.mode, tuple(sorted(heads))) if some else ("softmax", ())
        yield
    finally:
        for linear, mode, heads_before in before:
            linear.mode, linear.softmax_heads = mode, heads_before


def softmax_units(model: PreTrainedModel, *, heads: bool) -> list[int | str]:
    """The linearized layers of a model, or the KV heads of each, as `keep_softmax` takes them."""
    units: list[int | str] = []
    for layer, (_, module) in enumerate(_attention_modules(model)):
        if isinstance(linear := getattr(module, "linear", None), LinearWindow):
            units += [f"{layer}/{head}" for head in range(linear.kv_heads)] if heads else [layer]
    return units


def kept_softmax(model: PreTrainedModel) -> list[int | str]:
    """The layers, and KV heads of linearized ones, that have softmax attention, as `keep_softmax` takes them."""
    kept: list[int | str] = []
    for layer, (_, module) in enumerate(_attention_modules(model)):
        linear = getattr(module, "linear", None)
        kept += [f"{layer}/{n}" for n in linear.softmax_heads] if isinstance(linear, LinearWindow) else [layer]
    return kept


def linear_windows(model: nn.Module) -> dict[str, LinearWindow]:
    """Every LinearWindow of a model by the name of its attention module, in order; empty if it is not linearized."""
    windows = ((name, module) for name, module in model.named_modules() if isinstance(module, LinearWindow))
    return {name.removesuffix(".linear"): window for name, window in windows}


@contextlib.contextmanager
def using(
    model: nn.Module,
    *,
    mode: Mode | None = None,
    branch: Branch | None = None,
    compiled: bool | None = None,
) -> Iterator[None]:
    """Within it, linearized layers are in this mode, count this branch, and are compiled or not.

    mode "softmax" is the original model, the teacher. A cache that one mode has filled cannot be used by the other.
    """
    if branch is not None and branch not in BRANCHES:
        raise UsageError(f"branch must be one of {', '.join(BRANCHES)}, not {branch!r}")
    windows = linear_windows(model).values()
    before = [(linear.mode, linear.branch, linear.compiled) for linear in windows]
    try:
        for linear in windows:
            linear.mode, linear.branch = mode or linear.mode, branch or linear.branch
            linear.compiled = linear.compiled if compiled is None else compiled
        yield
    finally:
        for linear, old in zip(windows, before, strict=True):
            linear.mode, linear.branch, linear.compiled = old


def projections(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the layers before and after attention, in the model's order; targets: some of q, k, v, o."""
    patterns = [PROJECTIONS[target] for target in targets]
    return [name for name, _ in model.named_modules() if any(re.search(pattern, name) for pattern in patterns)]


def added_state(model: nn.Module) -> dict[str, Tensor]:
    """What linearizing added, by its name in model.state_dict(), detached."""
    return {
        f"{name}.linear.{key}": tensor.detach()
        for name, linear in linear_windows(model).items()
        for key, tensor in linear.state_dict().items()
    }


def load_added_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `added_state` gave into a model that was linearized with the same settings.

    Raises:
        UsageError: a layer is missing or too many, or a map has another shape.
    """
    own = added_state(model)
    if odd := sorted(own.keys() ^ state.keys()):
        where = "the model" if odd[0] in own else "the saved maps"
        raise UsageError(f"{odd[0]}: is only in {where}; they are of another base model or other settings")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            saved, wanted = tuple(state[name].shape), tuple(tensor.shape)
            raise UsageError(
                f"{name}: saved with shape {saved} and the model's is {wanted}; other settings or base model"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _attention_modules(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The modules that call the attention function: they know their layer and whether they are causal."""
    own = ("layer_idx", "is_causal", "config")
    modules = [(name, module) for name, module in model.named_modules() if all(hasattr(module, key) for key in own)]
    if getattr(model.config, "add_cross_attention", False) or not modules:
        raise UsageError(f"{type(model).__name__}: only models of self-attention can be linearized")
    return modules


def _check(config: LinearizeConfig, layers: int, kv_heads: int, *, causal: bool) -> None:
    """UsageError if a setting does not fit a model of so many attention layers."""
    pairs = [layer_and_head(entry) for entry in config.listed]
    unknown = next((layer for layer, _ in pairs if layer >= layers), None)
    config._need(unknown is None, "keep_softmax", f"there is no layer {unknown}; the model's are 0 to {layers - 1}")
    unknown = next((head for _, head in pairs if head is not None and head >= kv_heads), None)
    config._need(unknown is None, "keep_softmax", f"there is no KV head {unknown}; a layer's are 0 to {kv_heads - 1}")
    rule = f"names all {layers} layers, so that none would be linearized"
    whole = len(config.kept) * kv_heads + len(pairs) - len(config.kept)
    config._need(whole < layers * kv_heads, "keep_softmax", rule)
    units, what = (layers * kv_heads, "KV heads") if config.by_heads else (layers, "layers")
    config._need(config.chosen < units, "keep_softmax", f"the model has {units} {what}; choose fewer of them")
    config._need(causal or not config.chosen, "keep_softmax", f"is chosen for causal models alone; list the {what}")
    rule = "has no meaning in a two-sided model;"
    config._need(causal or config.kind != "terrace", "kind", f"{rule} choose standard")
    config._need(causal or not config.cache, "cache", f"{rule} set it to 0")
    config._need(causal or not config.gated, "state", f"{rule} choose additive")


def _check_reach(config: LinearizeConfig, model: PreTrainedModel) -> None:
    """UsageError if near keys would be some that the model itself never looks at."""
    own = getattr(model.config, "sliding_window", None) if hasattr(type(model.config), "sliding_window") else None
    if own is None:
        return
    config._need(not config.cache, "cache", "the model itself never looks beyond its sliding_window; set it to 0")
    largest = own if config.kind != "terrace" else own // 2  # a terrace's queries see up to two windows
    config._need(
        config.window <= largest, "window", f"the model's own sliding_window is {own}; choose at most {largest}"
    )


def _add_linear_window(
    module: Any,
    config: LinearizeConfig,
    *,
    causal: bool,
    generator: torch.Generator,
    before: str,
    device: torch.device | str | None,
) -> None:
    shape = module.config
    heads = shape.num_attention_heads
    linear = LinearWindow(
        config,
        heads=heads,
        kv_heads=shapes.kv_heads(shape),
        head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        causal=causal,
        generator=generator,
    )
    own = next(itertools.chain(module.parameters(), module.buffers())).device
    linear.to(own if device is None else device).train(module.training)
    linear.softmax_config, linear.softmax_name = shape, before
    linear.hook = module.register_forward_pre_hook(_adopt_cache, with_kwargs=True)
    module.linear = linear
    # A config of its own: changing the model's attention kernel must not switch linearized layers off.
    module.config = copy.copy(shape)
    module.config._attn_implementation = NAME


def _adopt_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention module runs: its LinearWindow's own layer in the cache that it is about to update."""
    linear: LinearWindow = module.linear
    linear.memory = None
    cache = kwargs.get("past_key_values")
    if cache is None:
        return
    while len(cache.layers) <= module.layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[module.layer_idx]
    ours = isinstance(layer, LinearWindowCache)
    if ours != (linear.mode == "linear"):
        if layer.get_seq_length():
            raise ValueError(f"layer {module.layer_idx} is in mode {linear.mode}, and another one has filled its cache")
        layer = cache.layers[module.layer_idx] = linear.new_cache() if linear.mode == "linear" else DynamicLayer()
    linear.memory = layer if isinstance(layer, LinearWindowCache) else None


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: q (B, H, T, D), k and v (B, G, S, D), y (B, T, H, D).

    attention_mask: None, or True for real tokens, (B, S) or longer at the front.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("linearized attention takes the mask of padding, (sequences, tokens), and no other")
    keep_BS = None if attention_mask is None else attention_mask[:, -key.shape[2] :].bool()
    linear: LinearWindow | None = getattr(module, "linear", None)
    if linear is None:
        return _softmax(module, query, key, value, keep_BS, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if linear.mode == "linear":
        memory, linear.memory = linear.memory, None
        heads, others, every = linear.softmax_heads, linear.linear_heads, linear.kv_heads
        if heads and memory is None:
            given = [of_kv_heads(x, every, others) for x in (query, key, value)]
            y_BHTD = functional_call(linear, linear.parameters_of(others), (*given, scale, keep_BS))
            key, value = (of_kv_heads(x, every, heads) for x in (key, value))
        else:
            y_BHTD = linear(query, key, value, scale, keep_BS, memory)
        if heads:
            if memory is not None:  # it has states of these heads, too, and their outputs go unused
                y_BHTD, key, value = of_kv_heads(y_BHTD, every, others), memory.softmax_keys, memory.softmax_values
                keep_BS = None if attention_mask is None else attention_mask[:, -key.shape[2] :].bool()
            own_BTHD, _ = _softmax(
                module, of_kv_heads(query, every, heads), key, value, keep_BS, dropout, scale, **kwargs
            )
            both_BHTD = torch.cat([y_BHTD, own_BTHD.transpose(1, 2).to(y_BHTD.dtype)], dim=1)
            y_BHTD = of_kv_heads(both_BHTD, every, [[*others, *heads].index(head) for head in range(every)])
        return y_BHTD.transpose(1, 2).contiguous(), None
    if linear.mode == "softmax":
        return _softmax(module, query, key, value, keep_BS, dropout, scale, **kwargs)
    with torch.no_grad():
        y_BTHD, _ = _softmax(module, query, key, value, keep_BS, 0.0, scale, **kwargs)
    assert linear.observer is not None
    linear.observer(linear, query, key, value, scale, keep_BS, y_BTHD.transpose(1, 2))
    return y_BTHD, None


def _softmax(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_BS: Tensor | None,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled dot product attention, which needs a full mask."""
    T, S = query.shape[2], key.shape[2]
    mask, reach = None, S if sliding_window is None else sliding_window
    if keep_BS is not None or reach < S or 1 < T < S:
        distance_TS = torch.arange(S - T, S, device=key.device)[:, None] - torch.arange(S, device=key.device)
        mask = distance_TS >= 0 if module.is_causal else torch.ones_like(distance_TS, dtype=torch.bool)
        mask = (mask & (distance_TS < reach))[None, None]
        mask = mask if keep_BS is None else mask & keep_BS[:, None, None]
    y_BTHD, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    return y_BTHD, None


def _padding_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask that `attention` takes: (B, S) as the caller of the model gave it, None if all tokens are real."""
    if attention_mask is None or is_tracing(attention_mask) or not attention_mask.all():
        return attention_mask
    return None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _padding_mask)

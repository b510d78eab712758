"""Swap a model's linear layers for sparse or masked ones, in place, and turn them back into dense ones."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sparse_kernels import masks
from sparse_kernels.deprecated import renamed_arguments
from sparse_kernels.layers import layer_seed, sparse_layers
from sparse_kernels.lora import AdaptedLinear
from sparse_kernels.masked_linear import MaskedLinear, masked_layers
from sparse_kernels.packed import Backend
from sparse_kernels.replace import carry_over, replace_module
from sparse_kernels.selection import (
    LayerReport,
    ModelReport,
    PatternOverrides,
    is_conv1d,
    select_layers,
    stored_weight,
)
from sparse_kernels.sparse_linear import SparseLinear

GROUPS = (2, 4, 8, 16)
"""The M of the N:M patterns that are detected in weights."""
Norms = Mapping[str, Tensor]
"""The norms of layers' inputs by the layers' names; what `input_norms` returns."""


@renamed_arguments
@torch.inference_mode(False)
def sparsify(
    model: nn.Module,
    *,
    n: int = 2,
    m: int = 4,
    mask: str = "magnitude",
    seed: int = 0,
    target_modules: Sequence[str] = (),
    exclude_modules: Sequence[str] = (),
    pattern_overrides: PatternOverrides = (),
    norms: Norms | None = None,
    rescale: bool = False,
    backward_rescale: bool = False,
    backend: Backend = "auto",
) -> ModelReport:
    """Replace linear layers (nn.Linear, transformers' Conv1D, MaskedLinear) by SparseLinear, in place.

    Output heads, the first layer after the input, shared weights, sides that no kernel takes, and layers with something
    that would be lost (`weight_norm`, parametrizations, a forward of their own) stay as they are; the report says why.
    A module that is used at several places stays one. Hooks, the training mode and `requires_grad` are carried over.
    The parameters are new ones: `SparseLinear.kept` brings an optimizer's state into their shape.

    Args:
        n, m, target_modules, exclude_modules, pattern_overrides: which layers, and their patterns; see `select_layers`.
        mask: "magnitude" of the present weights, "random" (from `seed` and the layer's name), "wanda" (see `norms`), or
            "present": that of each MaskedLinear, all layers being such.
        norms: for "wanda", from `input_norms`.
        rescale: multiply what each layer keeps by ||W|| / ||W ⊙ mask||, so that its outputs keep the dense variance.
        backward_rescale: of each layer; see `SparseLinear.backward_rescale`.
        backend: of each layer; see `set_backend`.

    Returns:
        A report of every linear layer: swapped, or why not.

    Raises:
        ValueError: as `select_layers`, an unknown mask kind, missing norms, or a present mask that is
            not the layer's N:M. Nothing was swapped.
    """
    which = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    report = select_layers(model, n=n, m=m, **which, pattern_overrides=pattern_overrides)
    _check_mask(model, report, mask, norms)
    for row, linear, weight_OI, bias_O, score_OI, conv1d in _layers_to_swap(model, report, mask, seed, norms):
        sparse = SparseLinear(weight_OI, bias_O, masks.nm_mask(score_OI, row.n, row.m), row.n, row.m, conv1d=conv1d)
        if rescale:
            _rescale(sparse, weight_OI)
        if backward_rescale:
            sparse.backward_rescale = True
        sparse.backend = backend
        _swap(model, linear, sparse, sparse.values)
    return report


@renamed_arguments
@torch.inference_mode(False)
def mask_layers(
    model: nn.Module,
    *,
    n: int = 2,
    m: int = 4,
    mask: str = "magnitude",
    seed: int = 0,
    transposable: bool = False,
    mvue: bool = False,
    straight_through: bool = True,
    soft_threshold: bool = False,
    target_modules: Sequence[str] = (),
    exclude_modules: Sequence[str] = (),
    pattern_overrides: PatternOverrides = (),
    norms: Norms | None = None,
) -> ModelReport:
    """Replace linear layers by MaskedLinear, in place: the same layers that `sparsify` would.

    Args:
        transposable: masks that are N:M along both sides.
        mvue: prune the output's gradient without bias for the weight's gradient.
        straight_through: let pruned weights have a gradient; a mask that never changes has no use for it.
        soft_threshold: make weights N:M by soft thresholding, which follows their magnitudes in every product.
        mask: how the first masks are chosen: "magnitude", "random" or "wanda". It and the others are `sparsify`'s.

    Returns:
        A report of every linear layer: swapped, or why not.

    Raises:
        ValueError: as `sparsify`, m > 4 and transposable, or soft_threshold and not by magnitude. Nothing was swapped.
    """
    which = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    report = select_layers(model, n=n, m=m, **which, pattern_overrides=pattern_overrides)
    if mask == "present":
        raise ValueError("mask kind 'present' is for sparsify alone")
    if soft_threshold and (mask != "magnitude" or transposable):
        raise ValueError(
            "soft thresholding keeps the largest magnitudes of a row's groups: no other mask, nor transposable"
        )
    _check_mask(model, report, mask, norms)
    if transposable and (largest := max(row.m for row in report.swapped)) > masks.LARGEST_TRANSPOSABLE:
        raise ValueError(f"transposable masks are searched for up to m={masks.LARGEST_TRANSPOSABLE}, got m={largest}")
    for row, linear, weight_OI, bias_O, score_OI, conv1d in _layers_to_swap(model, report, mask, seed, norms):
        masked = MaskedLinear(
            weight_OI,
            bias_O,
            row.n,
            row.m,
            score_OI=score_OI,
            transposable=transposable,
            mvue=mvue,
            straight_through=straight_through,
            soft_threshold=soft_threshold,
            conv1d=conv1d,
        )
        _swap(model, linear, masked, masked.weight)
    return report


def find_sparse_layers(model: nn.Module) -> list[str]:
    """Make the layers whose zeros are N:M sparse layers again, in place, each with its own pattern; their names."""
    try:
        linear = select_layers(model).swapped
    except ValueError:  # too small for any
        return []
    found = {layer.name: pattern(stored_weight(model.get_submodule(layer.name)).detach()) for layer in linear}
    patterns = {name: n_m for name, n_m in found.items() if n_m is not None}
    sparsify_as(model, patterns)
    return list(patterns)


def sparsify_as(model: nn.Module, patterns: Mapping[str, tuple[int, int]]) -> None:
    """Make exactly these layers sparse, in place, each with its own (N, M)."""
    for n, m in sorted(set(patterns.values())):
        others = [layer.name for layer in select_layers(model).layers if patterns.get(layer.name) != (n, m)]
        sparsify(model, n=n, m=m, exclude_modules=[f"^{re.escape(name)}$" for name in others])


def pattern(weight_OI: Tensor) -> tuple[int, int] | None:
    """The sparsest N:M pattern along the rows that a weight (out, in) fits, of those the smallest M; None if dense."""
    most = {}
    for m in (m for m in GROUPS if weight_OI.shape[0] % m == weight_OI.shape[1] % m == 0):
        most[m] = int((weight_OI.unflatten(1, (-1, m)) != 0).sum(-1).max())
    fits = [(n / m, m, n) for m, n in most.items() if 0 < n < m]
    return (min(fits)[2], min(fits)[1]) if fits else None


def _swap(model: nn.Module, old: nn.Module, new: SparseLinear | MaskedLinear, weight: nn.Parameter) -> None:
    """Replace a linear layer by a new one with its own parameters, of which `weight` is made from the old weight."""
    carry_over(cast(nn.Parameter, old.weight), weight)
    if new.bias is not None:
        carry_over(cast(nn.Parameter, old.bias), new.bias)
    replace_module(model, old, new)


def _layers_to_swap(
    model: nn.Module, report: ModelReport, mask: str, seed: int, norms: Norms | None
) -> Iterator[tuple[LayerReport, nn.Module, Tensor, Tensor | None, Tensor, bool]]:
    """Of each layer to swap: its row, itself, weight (out, in), bias, mask score (out, in), whether it is a Conv1D."""
    for row in report.swapped:
        linear = model.get_submodule(row.name)
        weight_OI, bias_O = stored_weight(linear).detach(), cast(Tensor | None, linear.bias)
        if isinstance(linear, MaskedLinear) and linear.scale is not None:
            weight_OI = linear.masked_weight.detach()
        if mask == "present":
            score_OI = cast(MaskedLinear, linear).mask
        else:
            norms_I = None if norms is None else norms.get(row.name)
            score_OI = masks.mask_score(weight_OI, mask, seed=layer_seed(seed, row.name), norms_I=norms_I)
        conv1d = linear.conv1d if isinstance(linear, MaskedLinear) else is_conv1d(linear)
        yield row, linear, weight_OI, bias_O, score_OI, conv1d


def _check_mask(model: nn.Module, report: ModelReport, mask: str, norms: Norms | None) -> None:
    """Raise ValueError if the masks of a report cannot be chosen in this way, before any layer is swapped."""
    if mask not in ("magnitude", "random", "wanda", "present"):
        raise ValueError(f"mask kind must be 'magnitude', 'random', 'wanda' or 'present', got {mask!r}")
    for row in report.swapped:
        linear = model.get_submodule(row.name)
        if mask == "wanda" and (norms is None or row.name not in norms or norms[row.name].shape != (row.in_features,)):
            raise ValueError(f"mask kind 'wanda' needs the norms of the {row.in_features} inputs of {row.name}")
        if mask != "present":
            continue
        if not isinstance(linear, MaskedLinear):
            raise ValueError(f"mask kind 'present' keeps existing masks, and {row.name} has none")
        if not linear.mask.is_meta and not masks.is_nm(linear.mask, row.n, row.m):
            raise ValueError(f"mask kind 'present' keeps existing masks, and that of {row.name} is not {row.n}:{row.m}")


@torch.no_grad()
def _rescale(layer: SparseLinear, weight_OI: Tensor) -> None:
    """Scale the values up to the dense weight's sum of squares."""
    dense, kept = (torch.linalg.vector_norm(W, dtype=torch.float64) for W in (weight_OI, layer.values))
    layer.values.mul_(torch.where(kept > 0, dense / kept, 1))


def input_norms(model: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """The L2 norm of each input feature of some layers, over all tokens that `run` feeds the model.

    Args:
        names: of the layers, as in `model.named_modules()`.
        run: called once, without gradients; put the model in eval mode for it where dropout would blur the norms.

    Returns:
        For each name (in,), float32, on the layer's device.

    Raises:
        ValueError: a name that the model does not have, or a layer that no token reached.
    """
    modules = dict(model.named_modules())
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            X_BI = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            sums_I = X_BI.float().square().sum(0)
            squares[name] = squares[name] + sums_I if name in squares else sums_I

        return hook

    wanted = list(names)
    if unknown := [name for name in wanted if name not in modules]:
        raise ValueError(f"{type(model).__name__} has no layer {unknown[0]!r}")
    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in wanted]
    try:
        # Compiled blocks would be compiled again with the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in wanted if name not in squares]:
        raise ValueError(f"no token reached {silent[0]}")
    return {name: squares[name].sqrt() for name in wanted}


@torch.inference_mode(False)
@torch.no_grad()
def to_dense(model: nn.Module, *, adapters: str = "refuse") -> None:
    """Turn every SparseLinear, MaskedLinear and AdaptedLinear back into the nn.Linear or Conv1D it was, in place.

    Pruned weights become zeros.

    Args:
        adapters: "merge" adds them to the weight (which is then no longer sparse), "drop" leaves them out,
            "refuse" raises if there are any.

    Raises:
        ValueError: a layer has an adapter and `adapters` is "refuse", or `adapters` is none of the three.
    """
    if adapters not in ("refuse", "merge", "drop"):
        raise ValueError(f"adapters must be 'refuse', 'merge' or 'drop', got {adapters!r}")
    layers: dict[str, SparseLinear | AdaptedLinear] = dict(sparse_layers(model))
    layers |= {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    if adapters == "refuse" and (adapted := [name for name, layer in layers.items() if layer.adapter is not None]):
        raise ValueError(f"{adapted[0]} has an adapter: say adapters='merge' or adapters='drop'")
    for layer in layers.values():
        replace_module(model, layer, dense_layer(layer, merged=adapters == "merge"))
    for _, masked in list(masked_layers(model)):
        replace_module(model, masked, dense_layer(masked))


def dense_layer(layer: SparseLinear | MaskedLinear | AdaptedLinear, *, merged: bool = False) -> nn.Module:
    """The layer as it was; merged: with its adapter's matrix, if it has one, added to the weight."""
    dense: nn.Module
    with torch.device("meta"):  # neither memory nor random numbers for a weight that is replaced
        if layer.conv1d:
            from transformers.pytorch_utils import Conv1D  # there are Conv1D layers only where there is transformers

            dense = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
    adapter = None if isinstance(layer, MaskedLinear) or not merged else layer.adapter
    if isinstance(layer, AdaptedLinear) and adapter is None:
        dense.weight = layer.weight  # itself, since it may be tied to another layer's
    else:
        weight_OI = layer.masked_weight if isinstance(layer, MaskedLinear) else layer.weight
        if isinstance(layer, AdaptedLinear) and layer.conv1d:
            weight_OI = weight_OI.t()
        weight_OI = weight_OI if adapter is None else weight_OI + adapter.delta()
        dense.weight = nn.Parameter(weight_OI.t().contiguous() if layer.conv1d else weight_OI)
        carry_over(layer.values if isinstance(layer, SparseLinear) else layer.weight, dense.weight)
    dense.register_parameter("bias", layer.bias)
    return dense

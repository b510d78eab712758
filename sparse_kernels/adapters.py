"""Low-rank adapters of single layers, dense or sparse, beside those that the layers have already.

Shape suffixes: O out features, I in features, R adapter rank.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn

from sparse_kernels.convert import adapter_rank, is_conv1d, stored_weight
from sparse_kernels.layers import layer_seed
from sparse_kernels.lora import AdaptedLinear, LowRankAdapter
from sparse_kernels.sparse_linear import SparseLinear


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear | AdaptedLinear]]:
    """(name, layer) of every layer with an adapter."""
    kinds = (SparseLinear, AdaptedLinear)
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    return ((name, layer) for name, layer in found if layer.adapter is not None)


def adapters_of(model: nn.Module) -> dict[str, LowRankAdapter]:
    """Every adapter of a model by its layer's name."""
    return {name: layer.adapter for name, layer in adapted_layers(model) if layer.adapter is not None}


def extend_adapters(
    model: nn.Module,
    names: Iterable[str],
    rank: int | float,
    *,
    alpha: float | None = None,
    init: str = "lora",
    seed: int = 0,
) -> dict[str, LowRankAdapter]:
    """Give layers a new low-rank adapter, which at first changes nothing, in place; no weight is touched.

    An nn.Linear or Conv1D becomes an AdaptedLinear of the same parameters. A layer that has an adapter of rank r gets
    one of rank r + `rank` in its place, the two beside each other: one product, and all of it is trainable, the old
    part too. (To freeze that part alone would take two products where one does.)

    Args:
        names: of the layers, as in `model.named_modules()`.
        rank, alpha, init: of the new part; see `add_adapters`.

    Returns:
        The adapters by layer name.

    Raises:
        ValueError: what `check_room` raises, a rank out of range, or another init.
    """
    names = list(names)
    check_room(model, names, rank)
    adapters = {}
    for name in names:
        layer = model.get_submodule(name)
        added = _new_adapter(layer, rank, alpha, init, layer_seed(seed, name))
        if isinstance(layer, SparseLinear | AdaptedLinear):
            layer.adapter = added if layer.adapter is None else beside(layer.adapter, added)
            adapters[name] = layer.adapter
        else:
            weight, bias = cast(nn.Parameter, layer.weight), cast(nn.Parameter | None, layer.bias)
            model.set_submodule(name, AdaptedLinear(weight, bias, added, conv1d=is_conv1d(layer)))
            adapters[name] = added
    return adapters


def check_room(model: nn.Module, names: Iterable[str], rank: int | float) -> None:
    """Whether `extend_adapters` can give these layers adapters of this rank, changing nothing.

    Raises:
        ValueError: a layer that is not linear, or whose adapters' ranks together would exceed its smaller side.
    """
    for name in names:
        layer = model.get_submodule(name)
        if not (isinstance(layer, SparseLinear | AdaptedLinear) or type(layer) is nn.Linear or is_conv1d(layer)):
            raise ValueError(f"{name} is no linear layer but a {type(layer).__name__}")
        sides = _sides(layer)
        there = getattr(layer, "adapter", None)
        taken = 0 if there is None else there.rank
        if taken + adapter_rank(rank, *sides) > min(sides):
            beside_it = f" and an adapter of rank {taken}" if taken else ""
            raise ValueError(f"{name} has a side of only {min(sides)}{beside_it}")


def _sides(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer of any kind."""
    if isinstance(layer, SparseLinear | AdaptedLinear):
        return layer.in_features, layer.out_features
    out_features, in_features = stored_weight(layer).shape
    return in_features, out_features


def _new_adapter(layer: nn.Module, rank: int | float, alpha: float | None, init: str, seed: int) -> LowRankAdapter:
    stored, sides = next(layer.parameters()), _sides(layer)
    return LowRankAdapter(
        *sides,
        adapter_rank(rank, *sides),
        alpha=alpha,
        init=init,
        generator=torch.Generator().manual_seed(seed),
        device=stored.device,
        dtype=stored.dtype,
    )


@torch.no_grad()
def beside(first: LowRankAdapter, second: LowRankAdapter) -> LowRankAdapter:
    """One adapter that computes the sum of two, of the rank of both and the scale of the second.

    Raises:
        ValueError: the rank of both exceeds a side.
    """
    A_RI = torch.cat([first.A, second.A])
    B_OR = torch.cat([first.B * (first.scale / second.scale), second.B], dim=1)
    both = LowRankAdapter(A_RI.shape[1], B_OR.shape[0], len(A_RI), device=A_RI.device, dtype=A_RI.dtype)
    both.A.copy_(A_RI)
    both.B.copy_(B_OR)
    both.scale = second.scale
    return both

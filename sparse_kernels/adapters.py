"""Low-rank adapters of a model's layers, sparse or dense.

Shape suffixes: O out features, I in features, R adapter rank.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn

from sparse_kernels.layers import layer_seed, sparse_layers
from sparse_kernels.lora import AdaptedLinear, LowRankAdapter
from sparse_kernels.replace import obstacle, replace_module
from sparse_kernels.selection import is_conv1d, stored_weight
from sparse_kernels.sparse_linear import SparseLinear


def adapter_rank(rank: int | float, out_features: int, in_features: int) -> int:
    """A rank given as a number (1 or more), or as a share of the layer's smaller side (below 1); at least 1."""
    return max(1, round(rank * min(out_features, in_features))) if rank < 1 else int(rank)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear | AdaptedLinear]]:
    """(name, layer) of every layer with an adapter."""
    kinds = (SparseLinear, AdaptedLinear)
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    return ((name, layer) for name, layer in layers if layer.adapter is not None)


def adapters_of(model: nn.Module) -> dict[str, LowRankAdapter]:
    """Every adapter of a model by its layer's name."""
    return {name: layer.adapter for name, layer in adapted_layers(model) if layer.adapter is not None}


@torch.inference_mode(False)
def add_adapters(
    model: nn.Module,
    rank: int | float,
    names: Iterable[str] | None = None,
    *,
    beside: bool = False,
    alpha: float | None = None,
    init: str = "lora",
    seed: int = 0,
) -> dict[str, LowRankAdapter]:
    """Give layers a new low-rank adapter, which at first changes nothing, in place; no weight is touched.

    An nn.Linear or Conv1D becomes an AdaptedLinear with the same parameters, hooks and mode, wherever it is used.

    Args:
        rank: a number, or a share of the layer's smaller side if below 1 (0.0156 of 1024 is 16).
        names: of the layers, as in `model.named_modules()`; None for every SparseLinear.
        beside: in place of an adapter of rank r, a layer gets one of rank r + `rank`, both side by side: one product,
            and all of it is trainable, the old part too (freezing that part would take a second product).
        alpha: the scaling is alpha / rank; None for that of `init`.
        init: "lora", A uniform and a scaling of 1, or "gaussian", A from N(0, 1) and a scaling of 1 / rank.

    Returns:
        The adapters by layer name; give their parameters to the optimizer (`add_param_group`).

    Raises:
        ValueError: no sparse layer, or as `check_adapters`, or an unknown init. Nothing was changed.
    """
    chosen = [name for name, _ in sparse_layers(model)] if names is None else list(names)
    if names is None and not chosen:
        raise ValueError("the model has no sparse layer to add adapters to")
    check_adapters(model, chosen, rank, beside=beside)
    layers: dict[nn.Module, str] = {}
    for name in chosen:
        layers.setdefault(model.get_submodule(name), name)  # once, under whichever of its names comes first
    adapters = {}
    for layer, name in layers.items():
        added = _new_adapter(layer, rank, alpha, init, layer_seed(seed, name))
        if isinstance(layer, SparseLinear | AdaptedLinear):
            layer.adapter = added if layer.adapter is None else _side_by_side(layer.adapter, added)
            layer.adapter.train(layer.training)
            adapters[name] = layer.adapter
        else:
            weight, bias = cast(nn.Parameter, layer.weight), cast(nn.Parameter | None, layer.bias)
            replace_module(model, layer, AdaptedLinear(weight, bias, added, conv1d=is_conv1d(layer)))
            adapters[name] = added
    return adapters


def check_adapters(model: nn.Module, names: Iterable[str], rank: int | float, *, beside: bool = False) -> None:
    """Whether `add_adapters` can give these layers adapters of this rank, changing nothing.

    Raises:
        ValueError: a bad rank, a layer that is not linear or would lose something (see `obstacle`), one that has an
            adapter (unless `beside`), or one whose adapters' ranks together would exceed its smaller side; the layer
            with the least room is named, and the largest rank that fits it.
    """
    if rank <= 0 or (rank >= 1 and rank != int(rank)):
        raise ValueError(f"rank must be a positive whole number or a share below 1, got {rank}")
    rooms: dict[str, tuple[int, str]] = {}
    for name in names:
        layer = model.get_submodule(name)
        if not (isinstance(layer, SparseLinear | AdaptedLinear) or type(layer) is nn.Linear or is_conv1d(layer)):
            raise ValueError(f"{name} is not a linear layer but a {type(layer).__name__}")
        if not isinstance(layer, SparseLinear | AdaptedLinear) and (lost := obstacle(layer)):
            raise ValueError(f"{name} cannot have an adapter: {lost}")
        sides = _sides(layer)
        present = getattr(layer, "adapter", None)
        if present is not None and not beside:
            raise ValueError(f"{name} has an adapter already")
        taken = 0 if present is None else present.rank
        room = min(sides) - taken
        if adapter_rank(rank, *sides) > room:
            beside_it = f" and an adapter of rank {taken}" if taken else ""
            rooms[name] = room, f"must be at most {room}: {name} has a side of only {min(sides)}{beside_it}"
    if rooms:
        raise ValueError(min(rooms.values(), key=lambda found: found[0])[1])


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
def _side_by_side(first: LowRankAdapter, second: LowRankAdapter) -> LowRankAdapter:
    """One adapter that computes the sum of two, of the rank of both and the scaling of the second."""
    A_RI = torch.cat([first.lora_A, second.lora_A])
    B_OR = torch.cat([first.lora_B * (first.scaling / second.scaling), second.lora_B], dim=1)
    both = LowRankAdapter(A_RI.shape[1], B_OR.shape[0], len(A_RI), device=A_RI.device, dtype=A_RI.dtype)
    both.lora_A.copy_(A_RI)
    both.lora_B.copy_(B_OR)
    both.scaling = second.scaling
    return both

"""Which layers multiply in fp8 (see operands.py) while they are in training mode.

Evaluation and generation stay in the dtype that they have without it: they run the model as it will be served.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.masked_linear import MaskedLinear, linear
from sparse_kernels.operands import COUNTED, operand
from sparse_kernels.replace import lend_forward
from sparse_kernels.selection import is_conv1d, stored_weight
from sparse_kernels.sharded import local
from sparse_kernels.sparse_linear import SparseLinear


class _Float8:
    """The forward pass that `set_fp8` lends to a dense layer."""

    training: bool
    bias: nn.Parameter | None

    def forward(self, X: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.training:
            return super().forward(X)  # type: ignore[misc, no-any-return]
        layer: Any = self
        return linear(X, stored_weight(layer), self.bias, counts=layer.fp8_counts)


def fp8_obstacle(device: torch.device) -> str:
    """Why a device cannot multiply in fp8; empty if it can. A CPU can, though no faster than in its other dtypes."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"needs compute capability 8.9, and {torch.cuda.get_device_name(device)} has less"
    return ""


def set_fp8(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly these linear layers multiply in fp8 when they train, from now on; parameters and names stay.

    An nn.Linear or Conv1D becomes an instance of a subclass of its class meanwhile: call this with () before layers are
    swapped for others.

    Raises:
        ValueError: a name that the model does not have, or one of another kind of module.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        plain = isinstance(layer, nn.Linear) or (layer is not None and is_conv1d(layer))
        if not (plain or isinstance(layer, SparseLinear | MaskedLinear)):
            raise ValueError(f"{type(model).__name__} has no linear layer {name!r}")
    chosen = {id(modules[name]) for name in names}
    for module in modules.values():
        on = id(module) in chosen
        if on == (_counts(module) is not None):
            continue
        device = next(module.parameters()).device if on else None
        counts = torch.zeros(len(COUNTED), 2, dtype=torch.int64, device=device) if on else None
        if isinstance(module, SparseLinear | MaskedLinear):
            module.fp8_counts = counts
            module.train(module.training)  # a sparse layer frees the packed weights that it read until now
        elif on:
            lend_forward(module, _Float8, on=True)
            module.register_buffer("fp8_counts", counts, persistent=False)
        else:
            lend_forward(module, _Float8, on=False)
            del module.fp8_counts


def _counts(module: nn.Module) -> Tensor | None:
    counts: Tensor | None = getattr(module, "fp8_counts", None)
    return counts


def fp8_layers(model: nn.Module) -> list[str]:
    """The names of the layers that multiply in fp8 when they train."""
    return [name for name, module in model.named_modules() if _counts(module) is not None]


def fp8_underflow(model: nn.Module) -> dict[str, float]:
    """The share of the entries of all layers' operands that were not zero and became so since the last call.

    Returns:
        By the operands' names, X, dY, and W as it is now; empty without layers in fp8, or where nothing was counted.
    """
    every = [(module, counts) for module in model.modules() if (counts := _counts(module)) is not None]
    if not every:
        return {}
    counted = torch.stack([counts for _, counts in every]).sum(0)
    of_W = torch.zeros_like(counted[0])
    for module, counts in every:
        counts.zero_()
        operand(_weight(module), fp8=True, counts=of_W)
    (entries, zeroed), *others = [of_W.tolist(), *counted.tolist()]
    found = {name: gone / all_ for name, (all_, gone) in zip(COUNTED, others, strict=True) if all_}
    return found | {"W": zeroed / entries} if found and entries else found


def _weight(layer: Any) -> Tensor:
    """What its products round, of which this process has the rows."""
    if isinstance(layer, MaskedLinear):
        return layer.local_masked_weight().detach()
    return local(layer.values if isinstance(layer, SparseLinear) else layer.weight).detach()

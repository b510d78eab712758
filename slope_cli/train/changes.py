"""What a step's update changes, measured on demand: norms by layer, and how many entries of masks are others.

A layer is a module with parameters of its own. Of split weights each process measures the rows that it has, and the
squares are summed; masks are whole everywhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_cli.distributed.sharding import Sharding
from sparse_kernels import mask_buffers, masked_layers, sparse_layers
from sparse_kernels.sharded import local


class Changes:
    """Measures an update that is made within it, before which the gradient is there, averaged and not clipped.

    Attributes:
        norms: "gradient", of the loss; "update", of the change of the weights; and "relative_update", that divided by
            the norm of the weights before, unless these were all 0: by the layer's name. Empty unless measured.
        masks_changed: the share of the entries of the masks that an update may change which it did change: of W^{R,C}
            in sparse layers, of the mask in masked ones. None if not measured, or if there are none.
    """

    def __init__(
        self, model: nn.Module, sharding: Sharding | None, *, norms: bool = False, masks: bool = False
    ) -> None:
        """
        Args:
            sharding: how the weights are split; None if each process has all.
            norms, masks: what to measure. Norms need a copy of the trained weights meanwhile, masks a bit an entry.
        """
        self._model, self._sharding, self._wants_norms, self._wants_masks = model, sharding, norms, masks
        self.norms: dict[str, dict[str, float]] = {}
        self.masks_changed: float | None = None
        self._trained: dict[str, nn.Parameter] = {}
        self._before, self._squares, self._masks = list[Tensor](), list[Tensor](), list[Tensor]()

    @torch.no_grad()
    def __enter__(self) -> "Changes":
        if self._wants_norms:
            self._trained = {name: p for name, p in self._model.named_parameters() if p.grad is not None}
            self._before = [local(p).clone() for p in self._trained.values()]
            gradients = [local(p.grad) for p in self._trained.values() if p.grad is not None]
            self._squares = [_squares(gradients), _squares(self._before)]
        if self._wants_masks:
            self._masks = [_bits(mask).clone() for mask in mask_buffers(self._model)]
        return self

    @torch.no_grad()
    def __exit__(self, kind: Any, *error: object) -> None:
        if kind is None:
            self._measure()
        del self._model  # the numbers outlive it
        for kept in (self._trained, self._before, self._squares, self._masks):
            kept.clear()

    def _measure(self) -> None:
        if self._trained:
            torch._foreach_sub_(self._before, [local(p) for p in self._trained.values()])
            self.norms = self._by_layer(torch.stack([*self._squares, _squares(self._before)]))
        if self._masks:
            changed = [_ones(old ^ _bits(new)) for old, new in zip(self._masks, mask_buffers(self._model), strict=True)]
            sides = [(layer.out_features, layer.in_features) for _, layer in sparse_layers(self._model)]
            sides += [(layer.out_features, layer.in_features) for _, layer in masked_layers(self._model)]
            self.masks_changed = int(torch.stack(changed).sum()) / sum(a * b for a, b in sides)

    def _by_layer(self, squares: Tensor) -> dict[str, dict[str, float]]:
        """The norms from the squares of gradients, weights and updates, (3, parameters), of this process's rows."""
        if self._sharding is not None:
            split = torch.tensor([isinstance(p, DTensor) for p in self._trained.values()], device=squares.device)
            squares = torch.where(split, self._sharding.sum_(squares.clone()), squares)
        rows: dict[str, list[float]] = {}
        for name, own in zip(self._trained, squares.t().tolist(), strict=True):
            layer = name.rpartition(".")[0]
            rows[layer] = [a + b for a, b in zip(rows.get(layer, [0.0] * 3), own, strict=True)]
        norms = {layer: [square**0.5 for square in row] for layer, row in rows.items()}
        return {
            "gradient": {layer: gradient for layer, (gradient, _, _) in norms.items()},
            "update": {layer: update for layer, (_, _, update) in norms.items()},
            "relative_update": {layer: update / weight for layer, (_, weight, update) in norms.items() if weight},
        }


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each tensor, stacked, in float64: the square of a norm may be beyond float32."""
    return torch.stack(torch._foreach_norm(list(tensors))).double().square()


def _bits(mask: Tensor) -> Tensor:
    """A mask with a bit for each entry, uint8: of bits itself, of bool eight in one."""
    if mask.dtype == torch.uint8:
        return mask
    flat = mask.flatten()
    rest = -len(flat) % 8
    eights = (nn.functional.pad(flat, (0, rest)) if rest else flat).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (eights.to(torch.uint8) << places).sum(1, dtype=torch.uint8)


def _ones(bits: Tensor) -> Tensor:
    """How many bits of a uint8 tensor are set, () int64."""
    pairs = bits - ((bits >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64)

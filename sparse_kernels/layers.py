"""The sparse layers of a whole model: finding them, renewing their masks, and the copies that a GPU's products read."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sparse_kernels import autotune, cuda, ops, packed
from sparse_kernels.masked_linear import masked_layers
from sparse_kernels.packed import Copies, Weight
from sparse_kernels.sparse_linear import SparseLinear


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """(name, layer) of every SparseLinear in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear))


def _copies_of(layer: SparseLinear) -> list[Copies]:
    """Those that the kernels can write from the layer's values: of a model that was cast, not those of before."""
    dtypes = ops.HALF if layer.values.dtype == torch.float32 else (layer.values.dtype,)
    return [found for dtype in dtypes if (found := packed.find(layer.positions, dtype))]


def _copies(model: nn.Module) -> Iterator[tuple[str, SparseLinear, Copies]]:
    """(name, layer, copies) of every sparse layer that has some, one for each of their dtypes."""
    return ((name, layer, found) for name, layer in sparse_layers(model) for found in _copies_of(layer))


def _weight(layer: SparseLinear) -> Weight:
    return Weight(layer.values, layer.positions, layer.positions_t)


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for each layer of a model, the same in every process."""
    return seed ^ zlib.crc32(name.encode())


@torch.no_grad()
def renew_column_masks(model: nn.Module, kind: str = "magnitude", seed: int = 0) -> None:
    """Choose W^{R,C} of every sparse layer anew; W^R's positions stay. The copies that are there follow at once.

    Args:
        kind: "magnitude" of the present values, or "random" among the kept entries.
        seed: of the random choice; give another at each renewal.
    """
    renewed: list[SparseLinear] = []
    works: list[cuda.Work] = []
    stale: list[tuple[SparseLinear, Copies]] = []
    for name, layer in sparse_layers(model):
        found = _copies_of(layer)
        if layer.kernel_prunes(kind):
            renewed.append(layer)
            works += (
                found[0].renew(_weight(layer), layer.bias) if found else [cuda.refresh(*_weight(layer), renew=True)]
            )
            found = found[1:]
        else:
            layer.renew_column_mask(kind, layer_seed(seed, name))
        stale += [(layer, copies) for copies in found]
    cuda.launch_all(works)
    cuda.launch_all(work for layer, copies in stale for work in copies.rewrite(_weight(layer), layer.bias))
    for layer in renewed:
        layer.renew_column_scale()


def renew_masks(model: nn.Module, *, columns: str = "magnitude", seed: int = 0) -> None:
    """Choose anew what may change while training: W^{R,C} of sparse layers, and the masks of masked ones.

    Args:
        columns, seed: kind and seed for `renew_column_masks`; masked layers go by their present magnitudes.
    """
    renew_column_masks(model, columns, seed)
    for _, layer in masked_layers(model):
        layer.renew_mask()


def masks_written(model: nn.Module) -> None:
    """Say that a replayed CUDA graph has renewed the masks and refreshed the copies, as no version counter has seen."""
    masks = [layer.positions_t for _, layer in sparse_layers(model)] + [layer.mask for _, layer in masked_layers(model)]
    torch.autograd.graph.increment_version(masks)
    for _, layer, found in _copies(model):
        found.settle(_weight(layer))


@torch.no_grad()
def prepare(model: nn.Module, tokens: int, dtype: torch.dtype = torch.bfloat16, *, backward: bool = True) -> None:
    """Measure and make now what the sparse layers on a GPU would at their first products.

    Needed before products are captured in a CUDA graph without a first step outside of one, as torch.compile with
    mode="reduce-overhead" does where it reuses a graph for a second model or block.

    Args:
        tokens: rows of the layers' inputs, all but the last side multiplied; fewer than 256 prepare nothing.
        dtype: of the products, bfloat16 or float16.
        backward: for the input gradient too.
    """
    for _, layer in sparse_layers(model):
        probe = torch.empty(0, dtype=dtype, device=layer.values.device)
        if (layer.n, layer.m) in ops.TWO_OF_FOUR and ops.fast(probe, layer.values) and tokens >= autotune.FEWEST_TOKENS:
            found = packed.copies_of(layer.positions, dtype)
            found.prepare(_weight(layer), layer.bias, tokens, backward=backward)


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Rewrite the 16-bit copies of every sparse layer from its `values` and positions, in place, in a launch or two.

    Needed after the optimizer's step where the products are replayed from a CUDA graph, which cannot see that the
    copies are stale, unless a renewal of the column masks follows, which does this too; may be captured in a graph
    itself, after the step, if the copies are fresh then or it is replayed before the next eager product. Elsewhere the
    layers do this on their own.
    """
    cuda.launch_all(work for _, layer, found in _copies(model) for work in found.rewrite(_weight(layer), layer.bias))


@dataclass(frozen=True)
class LayerBackend:
    """How one layer's two sparse products run. None: no product of this kind has run yet."""

    name: str
    dtype: torch.dtype
    forward: autotune.Choice | None
    input_grad: autotune.Choice | None


def backends(model: nn.Module) -> list[LayerBackend]:
    """What was chosen for every sparse layer that has run on a GPU in 16 bits, in the model's order."""
    rows = []
    for name, _, found in _copies(model):
        sides = (found.forward, found.backward)
        rows.append(LayerBackend(name, found.dtype, *(None if side is None else side.choice for side in sides)))
    return rows

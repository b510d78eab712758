"""A model whose matrices are split by rows over processes, by FSDP2 (torch.distributed.fsdp.fully_shard).

FSDP2 gathers a block's matrices for its forward and backward passes, in 16 bits where products are, and reduces their
gradients in float32. Here is what sparse layers need at its edges:

* A sparse layer's `values` are split in whole groups of rows, so that each process chooses the masks of its own rows
  from its own float32 weights, as one process would; then the bits are gathered. Masks are whole everywhere.
* Rank 0 alone has the model before it is split, and sends the others one block at a time.
* Vectors (biases, norms), and the maps of linearized attention, stay whole and float32; their gradients are averaged
  after the backward pass.
* Weights that are gathered for a block are packed for each product, in memory that layers of the same sides share.

Shape suffixes: O out features, I in features, R rows of this process, K kept entries of a row.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from slope_cli.distributed.collectives import begin_alone, gather_equal, send_from_first, sum_among
from slope_cli.distributed.layouts import Layout
from slope_cli.linearize.swap import linear_windows
from slope_cli.models.build import transformer_blocks
from sparse_kernels import MaskedLinear, SparseLinear, masked_layers, share_packed, sparse_layers
from sparse_kernels.layers import layer_seed
from sparse_kernels.sharded import local, local_rows, rows_of


class Sharding:
    """How a model is split. The same object serves all phases of a run, each of which has another model.

    Attributes:
        place: where a process builds a model to be split: rank 0 in its host's memory, the others its shapes alone.
    """

    def __init__(self, layout: Layout, world: int, device: torch.device, dtype: torch.dtype | None) -> None:
        """
        Args:
            layout: fsdp or hsdp.
            world: all processes; a multiple of layout.shard.
            dtype: of products, in which matrices are gathered; None for that of the weights.
        """
        self.layout, self.device, self.dtype, self.degree = layout, device, dtype, layout.shard
        begin_alone(device)
        names: tuple[str, ...] = ("shard",) if world == self.degree else ("replicate", "shard")
        shape = (world,) if world == self.degree else (world // self.degree, self.degree)
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.place = torch.device("meta" if self._mesh.get_rank() else "cpu")
        self._shards = self._mesh.get_group("shard")
        reduced: dict[str, Any] = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
        self._in_products = MixedPrecisionPolicy(param_dtype=dtype, **reduced)
        self._elsewhere = MixedPrecisionPolicy(**reduced)  # embeddings are looked up in float32, as on one device

    # ------------------------------------------------------------------------------------------------- splitting

    def split(self, model: nn.Module) -> None:
        """Bring a model to the device, block by block, and split its matrices; all its parameters are new ones then.

        Args:
            model: rank 0's, on any device. The others' may lie on "meta": they get rank 0's tensors.
        """
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, self._sent(buffer))
        maps = {p for window in linear_windows(model).values() for p in window.parameters()}
        whole = self._bring(model, lambda p: p.dim() < 2 or p in maps)
        for block in transformer_blocks(model):
            self._bring(block, lambda p: p not in whole)
            self._split(block, self._in_products, reshard=self.layout.gather == "block", whole=whole)
        self._bring(model, lambda p: p not in whole and not isinstance(p, DTensor))
        self._split(model, self._elsewhere, reshard=False, whole=whole)
        if self.layout.gather == "block":
            share_packed(model)

    def split_frozen(self, model: nn.Module) -> None:
        """Split a model that has forward passes alone: it is gathered block by block, whatever the layout."""
        self.split(model)
        cast(FSDPModule, model).set_reshard_after_forward(True)
        share_packed(model)

    def _bring(self, module: nn.Module, which: Callable[[nn.Parameter], bool]) -> set[nn.Parameter]:
        """Replace parameters by rank 0's, on the device, and return these; what is shared stays so."""
        brought: dict[nn.Parameter, nn.Parameter] = {}
        for inner in module.modules():
            for name, old in list(inner.named_parameters(recurse=False)):
                if which(old):
                    if old not in brought:
                        brought[old] = nn.Parameter(self._sent(old.detach()), requires_grad=old.requires_grad)
                    setattr(inner, name, brought[old])
        return set(brought.values())

    def _sent(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on the device."""
        meta = tensor.is_meta
        own = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device) if meta else tensor.to(self.device)
        own = own.contiguous()
        send_from_first(own)
        return own

    def _split(
        self, module: nn.Module, policy: MixedPrecisionPolicy, *, reshard: bool, whole: set[nn.Parameter]
    ) -> None:
        fully_shard(module, mesh=self._mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=whole)

    def begin_micro_batch(self, model: nn.Module, *, last: bool) -> None:
        """Say whether a micro-batch is the last of its step: until then, with gather=step, weights stay gathered."""
        root = cast(FSDPModule, model)
        root.set_reshard_after_backward(last or self.layout.gather == "block")
        root.set_requires_all_reduce(last)

    def reshard(self, model: nn.Module) -> None:
        """Let a model have only its own rows, after a forward pass without a backward one."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor, in place, over the processes that together have all rows."""
        return sum_among(tensor, self._shards)

    # ----------------------------------------------------------------------------------------------------- masks

    @torch.no_grad()
    def update_masks(self, model: nn.Module, backward: str, seed: int) -> None:
        """As `sparse_kernels.update_masks`: each process chooses for its own rows, then the masks are gathered."""
        sparse, masked = list(sparse_layers(model)), [layer for _, layer in masked_layers(model) if not layer.unmasked]
        for name, random in sparse if backward != "magnitude" else ():
            random.choose_backward_mask_at_random(backward, layer_seed(seed, name))
        followers = [layer for _, layer in sparse] if backward == "magnitude" else []
        own = [layer.backward_bits(local(layer.values), local_rows(layer.values)) for layer in followers]
        own += [layer.chosen(local(layer.weight)).view(torch.uint8) for layer in masked]
        parts = self._gather([*followers, *masked], own)
        for followed, bits in zip(followers, parts[: len(followers)], strict=True):
            followed.backward_mask_bits.copy_(torch.cat(bits, dim=1))  # (I, R/8) of each process -> (I, O/8)
        for layer, rows in zip(masked, parts[len(followers) :], strict=True):
            layer.mask.copy_(torch.cat(rows).view(torch.bool))  # (R, I) of each process -> (O, I)
        self._update_backward_scales([layer for _, layer in sparse])

    def _shape(self, layer: SparseLinear | MaskedLinear, rank: int) -> tuple[int, int]:
        """Of the part of a layer's mask that a process chooses."""
        rows = rows_of(layer.out_features, rank, self.degree)
        count = rows.stop - rows.start
        return (layer.in_features, -(-count // 8)) if isinstance(layer, SparseLinear) else (count, layer.in_features)

    def _gather(self, layers: Sequence[SparseLinear | MaskedLinear], own: Sequence[Tensor]) -> list[list[Tensor]]:
        """The parts of each layer's mask, uint8, of all processes in their order; own: those of this process."""
        if not layers:
            return []
        shapes = [[self._shape(layer, rank) for layer in layers] for rank in range(self.degree)]
        size = sum(height * width for height, width in shapes[0])  # the first process has most
        buffer = torch.zeros(size, dtype=torch.uint8, device=self.device)
        flat = torch.cat([part.flatten() for part in own])
        buffer[: len(flat)] = flat
        by_rank = []
        for row, each in zip(gather_equal(buffer, self._shards), shapes, strict=True):
            counts = [height * width for height, width in each]
            parts = row[: sum(counts)].split(counts)
            by_rank.append([part.view(shape) for part, shape in zip(parts, each, strict=True)])
        return [list(parts) for parts in zip(*by_rank, strict=True)]

    def _update_backward_scales(self, layers: Sequence[SparseLinear]) -> None:
        """Compute each `backward_scale` from the norms of all rows."""
        scaled = [layer for layer in layers if layer.backward_scale is not None]
        if not scaled:
            return
        norms = [layer.norms(local(layer.values), local_rows(layer.values)) for layer in scaled]
        squares = sum_among(torch.stack(norms).square_(), self._shards)
        for layer, (forward, backward) in zip(scaled, squares.sqrt(), strict=True):
            layer.set_backward_scale(forward, backward)

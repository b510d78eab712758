"""SparseLinear, a linear layer whose only weight is its kept entries.

Shape suffixes: O out features, I in features, K = I·N/M kept entries of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_kernels import cuda, masks, ops, reference
from sparse_kernels.deprecated import rename_saved, renamed
from sparse_kernels.lora import LowRankAdapter
from sparse_kernels.packed import Backend, Derived, free


class _ScaleGradient(torch.autograd.Function):
    """X itself; its gradient times `scale`, a tensor of shape ()."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return X.view_as(X)

    @staticmethod
    def backward(ctx: Any, dX: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return dX * scale.to(dX.dtype), None


class SparseLinear(nn.Module):
    """A linear layer with an N:M sparse weight W^R, and W^{R,C}, W^R pruned again, for the input gradient.

    Frozen (values.requires_grad is False) it passes the input gradient through W^R itself, which is exact.

    Attributes:
        values: parameter (out, in·n/m), the kept entries of W^R row by row in column order.
        bias: parameter (out,) or None.
        row_mask_bits: uint8 buffer (out, ceil(in/8)), W^R's mask; fixed once it is chosen, but for
            `sparse_kernels.update_row_masks`.
        backward_mask_bits: uint8 buffer (in, ceil(out/8)), W^{R,C}'s mask, transposed; see `update_backward_mask`.
        backward_scale: buffer () or None, a factor of the input gradient; see `backward_rescale`.
        adapter: a LowRankAdapter or None; its output is added.
        backend: how a 2:4 layer is computed on a GPU; see `sparse_kernels.set_backend`.
        fp8_counts: buffer int64 (2, 2), not saved, of a layer whose products in training have e4m3 operands, or None;
            see `sparse_kernels.set_fp8`.
        dense_weight: W^R as a dense matrix (out, in) or None; see `sparse_kernels.dense_weights`. Never saved.
        prunes_input: in training the input is pruned; see `sparse_kernels.defer_activations`.
        conv1d: the layer was a transformers Conv1D, and `to_dense` makes it one again.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    row_mask_bits: Tensor
    backward_mask_bits: Tensor
    backward_scale: Tensor | None
    fp8_counts: Tensor | None
    adapter: LowRankAdapter | None

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None, row_mask_OI: Tensor, n: int, m: int, *, conv1d: bool = False
    ) -> None:
        """Copy the kept entries of `weight_OI`.

        Args:
            weight_OI: (out, in), the dense weight; on the meta device shapes alone are made.
            bias_O: (out,) or None.
            row_mask_OI: bool (out, in) with exactly n True in every m along a row.

        Raises:
            ValueError: a side is not a multiple of m, or the mask is not exactly N:M.
        """
        super().__init__()
        self.n, self.m, self.conv1d = n, m, conv1d
        self.out_features, self.in_features = weight_OI.shape
        if self.out_features % m or self.in_features % m:
            raise ValueError(f"sides {self.out_features} x {self.in_features} are not multiples of m={m}")
        if not weight_OI.is_meta and not masks.is_nm(row_mask_OI, n, m):
            raise ValueError(f"the row mask is not exactly {n}:{m}")
        self.values = nn.Parameter(self._kept(weight_OI.detach(), row_mask_OI))
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().clone())
        backward_mask_OI = masks.double_prune(weight_OI.detach(), row_mask_OI, n, m)
        self.register_buffer("row_mask_bits", masks.pack_bits(row_mask_OI))
        self.register_buffer("backward_mask_bits", masks.pack_bits(backward_mask_OI.t()))
        self.register_buffer("backward_scale", None)
        self.register_buffer("fp8_counts", None, persistent=False)
        self.adapter = None
        self.prunes_input = False
        self.backend: Backend = "auto"
        self.dense_weight: Tensor | None = None
        self._index: Derived | None = None
        self._survives: Derived | None = None

    def train(self, mode: bool = True) -> "SparseLinear":
        """As nn.Module's; training also frees the packed weights, in fp8 or not, that only evaluation has read."""
        if mode:
            free(self.row_mask_bits, scaled=self.fp8_counts is None)
        return super().train(mode)

    def forward(self, X: Tensor) -> Tensor:
        """(..., in) -> (..., out); under autocast the products run in the autocast dtype, as nn.Linear's do."""
        device = X.device.type
        if torch.is_autocast_enabled(device):
            X = X.to(torch.get_autocast_dtype(device))
        for_weight = None
        if self.prunes_input and self.training:
            X, for_weight = masks.prune_features(X), masks.prune_tokens(X)
        Y = self._product(X, for_weight)
        return Y if self.adapter is None else Y + self.adapter(X)

    def _product(self, X: Tensor, for_weight_BI: Tensor | None) -> Tensor:
        if self.dense_weight is not None and self.dense_weight.dtype == X.dtype and not torch.is_grad_enabled():
            bias_O = None if self.bias is None else self.bias.to(X.dtype)
            return F.linear(X, self.dense_weight, bias_O)  # [B,I] · [O,I]^T -> [B,O]
        if self.backward_scale is not None and self.values.requires_grad:  # a frozen layer's gradient is exact
            X = _ScaleGradient.apply(X, self.backward_scale)
        counts = self.fp8_counts if self.training else None
        compiling, bits = torch.compiler.is_compiling(), (self.row_mask_bits, self.backward_mask_bits)
        packable = for_weight_BI is None and (self.n, self.m) in ops.TWO_OF_FOUR
        if packable and counts is None and (compiling or ops.fast(X, self.values, self.backend)):
            return ops.linear(X, self.values, self.bias, *bits, self.backend)
        half = X.dtype == torch.bfloat16
        if packable and counts is not None and half and (compiling or ops.fast_fp8(self.values, self.backend)):
            return ops.fp8_linear(X, self.values, self.bias, *bits, counts, self.backend)
        return reference.sparse_linear(X, self.values, self.bias, *self.layout(), counts, for_weight_BI)

    def layout(self) -> tuple[Tensor, Tensor]:
        """Where the values sit: their columns, int64 (out, in·n/m), and whether W^{R,C} keeps them, bool, same shape.

        Derived from the two mask buffers and kept while these are unchanged; computed at each call while torch compiles
        or captures a CUDA graph: a replay must read the bits that a mask update wrote.
        """
        if torch.compiler.is_compiling() or (self.values.is_cuda and torch.cuda.is_current_stream_capturing()):
            index_OK = self._kept_columns()
            return index_OK, self.backward_mask().gather(1, index_OK)
        with torch.inference_mode(False):  # what is kept from a validation serves the training step after it, too
            if self._index is None or not self._index.is_of(self.row_mask_bits):
                self._index, self._survives = Derived.of(self._kept_columns(), self.row_mask_bits), None
            if self._survives is None or not self._survives.is_of(self.backward_mask_bits):
                survives_OK = self.backward_mask().gather(1, self._index.tensor)
                self._survives = Derived.of(survives_OK, self.backward_mask_bits)
        return self._index.tensor, self._survives.tensor

    def _kept_columns(self) -> Tensor:
        return reference.kept_columns(self.row_mask(), self.n, self.m)

    def row_mask(self) -> Tensor:
        """The mask of W^R: bool (out, in)."""
        return masks.unpack_bits(self.row_mask_bits, self.in_features)

    def backward_mask(self) -> Tensor:
        """The mask of W^{R,C}: bool (out, in)."""
        return masks.unpack_bits(self.backward_mask_bits, self.out_features).t()

    @property
    def weight(self) -> Tensor:
        """W^R as a dense matrix (out, in), the forward product's weight; a derived copy."""
        return reference.scatter_kept(self.values, self.layout()[0], self.in_features)

    @property
    def weight_backward(self) -> Tensor:
        """W^{R,C} as a dense matrix (out, in), the input gradient's weight; a derived copy."""
        index_OK, survives_OK = self.layout()
        return reference.scatter_kept(self.values * survives_OK, index_OK, self.in_features)

    @property
    def backward_rescale(self) -> bool:
        """Whether dX is multiplied by ||W^R|| / ||W^{R,C}||, which gives W^{R,C} the scale of W^R; off by default.

        The factor is that of the last update of the backward mask. It is saved, as `backward_scale`, if this is on.
        """
        return self.backward_scale is not None

    @backward_rescale.setter
    @torch.inference_mode(False)
    def backward_rescale(self, on: bool) -> None:
        self.backward_scale = torch.ones((), device=self.values.device) if on else None
        self.update_backward_scale()

    @torch.no_grad()
    def update_backward_mask(self, kind: str = "magnitude", seed: int = 0) -> None:
        """Choose W^{R,C} again; W^R's mask stays (section 4.3.1 of the paper).

        Args:
            kind: "magnitude" of the present values, or "random" among the kept entries, from `seed`.
        """
        if self.kernel_chooses(kind):
            cuda.launch(cuda.refresh(self.values, self.row_mask_bits, self.backward_mask_bits, update_mask=True))
        elif kind == "magnitude":
            mask_OI = masks.double_prune(self.scattered(), self.row_mask(), self.n, self.m)
            self.backward_mask_bits.copy_(masks.pack_bits(mask_OI.t()))
        else:
            self.choose_backward_mask_at_random(kind, seed)
        self.update_backward_scale()

    def kernel_chooses(self, kind: str) -> bool:
        """Whether the GPU kernel can choose W^{R,C} in this way; plain torch does otherwise."""
        return kind == "magnitude" and (self.n, self.m) == (2, 4) and ops.fast_weight(self.values, self.backend)

    def backward_bits(self, values_RK: Tensor, rows: slice) -> Tensor:
        """The bits of W^{R,C}'s mask, chosen by magnitude, for some of the rows: whole groups of m.

        Args:
            values_RK: the values of these rows, where a process has no others.

        Returns:
            uint8 (in, ceil(rows/8)); those of all rows side by side are `backward_mask_bits`.
        """
        row_bits = self.row_mask_bits[rows]
        if not len(values_RK):
            return row_bits.new_empty(self.in_features, 0)
        if (self.n, self.m) == (2, 4) and ops.fast_weight(values_RK, self.backend):
            bits = torch.zeros(self.in_features, -(-len(values_RK) // 8), dtype=torch.uint8, device=values_RK.device)
            cuda.launch(cuda.refresh(values_RK, row_bits, bits, update_mask=True))
            return bits
        row_mask_RI = masks.unpack_bits(row_bits, self.in_features)
        mask_RI = masks.double_prune(masks.scatter(values_RK, row_mask_RI), row_mask_RI, self.n, self.m)
        return masks.pack_bits(mask_RI.t())

    def choose_backward_mask_at_random(self, kind: str, seed: int) -> None:
        """Choose W^{R,C} again in a way that does not depend on the values, which need not be here."""
        row_mask_OI = self.row_mask()
        mask_OI = masks.double_prune(row_mask_OI.float(), row_mask_OI, self.n, self.m, kind=kind, seed=seed)
        self.backward_mask_bits.copy_(masks.pack_bits(mask_OI.t()))

    @torch.no_grad()
    def update_backward_scale(self) -> None:
        """Compute `backward_scale` from the present masks and values, if there is one."""
        if self.backward_scale is not None:
            self.set_backward_scale(*self.norms(self.values, slice(0, self.out_features)))

    def norms(self, values_RK: Tensor, rows: slice) -> Tensor:
        """The norms of some rows of W^R and of W^{R,C}: (2,) float32."""
        W_RI = masks.scatter(values_RK.detach(), masks.unpack_bits(self.row_mask_bits[rows], self.in_features)).float()
        return torch.stack([W_RI.norm(), torch.where(self.backward_mask()[rows], W_RI, 0).norm()])

    def set_backward_scale(self, forward: Tensor, backward: Tensor) -> None:
        """Set `backward_scale` from the norms of W^R and W^{R,C}, each ()."""
        assert self.backward_scale is not None
        self.backward_scale.copy_(torch.where(backward > 0, forward / backward, 1))

    def scattered(self, dtype: torch.dtype | None = None) -> Tensor:
        """W^R as `weight` has it, without its graph, in another dtype if one is given; by the index if there is one."""
        values_OK = self.values.detach().to(dtype or self.values.dtype)
        if self._index is None or self.values.is_cuda:
            return masks.scatter(values_OK, self.row_mask())
        return reference.scatter_kept(values_OK, self.layout()[0], self.in_features)

    def kept(self, dense: Tensor, *, transposed: bool = False) -> Tensor:
        """The entries of a dense tensor at the kept positions, as `values` has those of the weight.

        For tensors that belong to the dense weight that this layer came from: its gradient, an optimizer's moments.

        Args:
            dense: (out, in), any dtype.
            transposed: it is (in, out) instead, as a Conv1D's weight.

        Returns:
            (out, in·n/m), a copy on the device and in the dtype of `dense`.

        Raises:
            ValueError: another shape.
        """
        dense_OI = dense.t() if transposed else dense
        if dense_OI.shape != (self.out_features, self.in_features):
            shape = tuple(dense_OI.shape)
            raise ValueError(f"expected a tensor of ({self.out_features}, {self.in_features}), got {shape}")
        return self._kept(dense_OI, self.row_mask().to(dense.device))

    def _kept(self, dense_OI: Tensor, row_mask_OI: Tensor) -> Tensor:
        if dense_OI.is_meta:
            return dense_OI.new_empty(self.out_features, self.in_features * self.n // self.m)
        return dense_OI[row_mask_OI].view(self.out_features, -1)

    def validate(self) -> None:
        """Check the masks: W^R exactly N:M, W^{R,C} a subset of it and at most N:M along the output features.

        Raises:
            ValueError: with the first rule that is broken.
        """
        row_OI, backward_OI = self.row_mask(), self.backward_mask()
        if not masks.is_nm(row_OI, self.n, self.m):
            raise ValueError(f"the stored row mask is not exactly {self.n}:{self.m}")
        if (backward_OI & ~row_OI).any():
            raise ValueError("the stored backward mask keeps an entry that the row mask prunes")
        if (backward_OI.unflatten(0, (-1, self.m)).sum(1) > self.n).any():
            raise ValueError(f"the stored backward mask keeps more than {self.n} of {self.m}")

    def extra_repr(self) -> str:
        sides = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sides}, bias={self.bias is not None}, {self.n}:{self.m}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_saved(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    positions = renamed("positions", "row_mask_bits")
    positions_t = renamed("positions_t", "backward_mask_bits")
    column_scale = renamed("column_scale", "backward_scale")
    column_rescale = renamed("column_rescale", "backward_rescale")
    column_mask = renamed("column_mask", "backward_mask")
    renew_column_mask = renamed("renew_column_mask", "update_backward_mask")

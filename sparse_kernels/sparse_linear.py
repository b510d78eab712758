"""SparseLinear, a linear layer whose only weight is its kept entries, and the low-rank adapter beside it.

AdaptedLinear is a dense layer with such an adapter.

Shape suffixes: O out features, I in features, K = I·N/M kept entries of a row, R adapter rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_kernels import cuda, masks, ops, reference
from sparse_kernels.lora import LowRankAdapter


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


class _Derived(NamedTuple):
    """What was made from a buffer as it was in one version."""

    tensor: Tensor
    buffer: Tensor
    version: int

    @classmethod
    def of(cls, buffer: Tensor, tensor: Tensor) -> "_Derived":
        return cls(tensor, buffer, buffer._version)

    def is_of(self, buffer: Tensor) -> bool:
        """Whether the buffer is still this one, and as it was."""
        return self.buffer is buffer and self.version == buffer._version


class SparseLinear(nn.Module):
    """A linear layer with an N:M sparse weight W^R and a twice-pruned W^{R,C} for the input gradient.

    Frozen (values.requires_grad is False) it passes the input gradient through W^R itself, which is exact.

    Attributes:
        values: parameter (out, in·n/m), the kept entries of W^R row by row in column order.
        bias: parameter (out,) or None.
        positions: uint8 buffer (out, ceil(in/8)), the bits of W^R's mask; fixed for the whole run.
        positions_t: uint8 buffer (in, ceil(out/8)), the bits of W^{R,C}'s mask, transposed; see `renew_column_mask`.
        column_scale: buffer () or None, what the input gradient of the sparse product is multiplied by; see
            `column_rescale`.
        adapter: a LowRankAdapter or None; its output is added.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    positions: Tensor
    positions_t: Tensor
    column_scale: Tensor | None
    adapter: LowRankAdapter | None

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None, row_mask_OI: Tensor, n: int, m: int, *, conv1d: bool = False
    ) -> None:
        """Take over the kept entries of `weight_OI`.

        Args:
            weight_OI: (out, in), the dense weight.
            bias_O: (out,) or None.
            row_mask_OI: bool (out, in) with exactly n True in every m along a row.
            conv1d: the layer came from transformers' Conv1D, and `densify` makes it one again.

        Raises:
            ValueError: a side is no multiple of m, or the mask is not exactly N:M.
        """
        super().__init__()
        self.n, self.m, self.conv1d = n, m, conv1d
        self.out_features, self.in_features = weight_OI.shape
        if self.out_features % m or self.in_features % m:
            raise ValueError(f"sides {self.out_features} x {self.in_features} are not multiples of m={m}")
        if not masks.is_nm(row_mask_OI, n, m):
            raise ValueError(f"the row mask is not exactly {n}:{m}")
        self.values = nn.Parameter(weight_OI.detach()[row_mask_OI].view(self.out_features, -1))
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().clone())
        column_mask_OI = masks.double_prune(weight_OI.detach(), row_mask_OI, n, m)
        self.register_buffer("positions", masks.pack_bits(row_mask_OI))
        self.register_buffer("positions_t", masks.pack_bits(column_mask_OI.t()))
        self.register_buffer("column_scale", None)
        self.adapter = None
        self._index: _Derived | None = None
        self._survives: _Derived | None = None

    def forward(self, X: Tensor) -> Tensor:
        """(..., in) -> (..., out); under autocast the products run in the autocast dtype, as nn.Linear's do."""
        device = X.device.type
        if torch.is_autocast_enabled(device):
            X = X.to(torch.get_autocast_dtype(device))
        rescaled = self.column_scale is not None and self.values.requires_grad  # frozen values pass an exact gradient
        X_sparse: Tensor = _ScaleGradient.apply(X, self.column_scale) if rescaled else X
        if (self.n, self.m) in ops.TWO_OF_FOUR and (torch.compiler.is_compiling() or ops.fast(X, self.values)):
            Y = ops.linear(X_sparse, self.values, self.bias, self.positions, self.positions_t)
        else:
            Y = reference.sparse_linear(X_sparse, self.values, self.bias, *self.layout())
        return Y if self.adapter is None else Y + self.adapter(X)

    def layout(self) -> tuple[Tensor, Tensor]:
        """Where the values sit: their columns, int64 (out, in·n/m), and whether W^{R,C} keeps them, bool, same shape.

        Derived from the two saved buffers, each kept until what it comes from is replaced or written in place; where
        torch compiles, or a CUDA graph is captured, each time: a replay must read the bits that a renewal wrote.
        """
        if torch.compiler.is_compiling() or (self.positions.is_cuda and torch.cuda.is_current_stream_capturing()):
            index_OK = self._kept_columns()
            return index_OK, self.column_mask().gather(1, index_OK)
        if self._index is None or not self._index.is_of(self.positions):
            self._index, self._survives = _Derived.of(self.positions, self._kept_columns()), None
        if self._survives is None or not self._survives.is_of(self.positions_t):
            survives_OK = self.column_mask().gather(1, self._index.tensor)
            self._survives = _Derived.of(self.positions_t, survives_OK)
        return self._index.tensor, self._survives.tensor

    def _kept_columns(self) -> Tensor:
        return reference.kept_columns(self.row_mask(), self.n, self.m)

    def row_mask(self) -> Tensor:
        """The mask of W^R: bool (out, in)."""
        return masks.unpack_bits(self.positions, self.in_features)

    def column_mask(self) -> Tensor:
        """The mask of W^{R,C}: bool (out, in)."""
        return masks.unpack_bits(self.positions_t, self.out_features).t()

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
    def column_rescale(self) -> bool:
        """Whether dX is multiplied by ||W^R|| / ||W^{R,C}||, which gives W^{R,C} the scale of W^R; off at first.

        The factor is that of the last renewal of the column mask. It is saved, as `column_scale`, only if this is on.
        """
        return self.column_scale is not None

    @column_rescale.setter
    def column_rescale(self, on: bool) -> None:
        self.column_scale = torch.ones((), device=self.values.device) if on else None
        self.renew_column_scale()

    @torch.no_grad()
    def renew_column_mask(self, kind: str = "magnitude", seed: int = 0) -> None:
        """Choose W^{R,C} anew; W^R's positions stay (section 4.3.1 of the paper).

        Args:
            kind: "magnitude" of the present values, or "random" among the kept entries, from `seed`.
        """
        if self.kernel_prunes(kind):
            cuda.launch(cuda.refresh(self.values, self.positions, self.positions_t, renew=True))
        else:
            rows_OI = self.row_mask()
            column_mask_OI = masks.double_prune(self._scattered(), rows_OI, self.n, self.m, kind=kind, seed=seed)
            self.positions_t.copy_(masks.pack_bits(column_mask_OI.t()))
        self.renew_column_scale()

    def kernel_prunes(self, kind: str) -> bool:
        """Whether the kernel is to choose W^{R,C}, on a GPU; else plain torch must."""
        return kind == "magnitude" and (self.n, self.m) == (2, 4) and ops.fast_weight(self.values)

    @torch.no_grad()
    def renew_column_scale(self) -> None:
        """Bring `column_scale` up to date with the present masks and values, if there is one."""
        if self.column_scale is not None:
            W_OI = self._scattered().float()
            both = W_OI.norm(), torch.where(self.column_mask(), W_OI, 0).norm()
            self.column_scale.copy_(torch.where(both[1] > 0, both[0] / both[1], 1))

    def _scattered(self) -> Tensor:
        """W^R as `weight` has it; on a GPU, where the products want no index, without making one."""
        if not self.positions.is_cuda:
            return reference.scatter_kept(self.values.detach(), self.layout()[0], self.in_features)
        row_mask_OI = self.row_mask()
        return torch.zeros_like(row_mask_OI, dtype=self.values.dtype).masked_scatter_(row_mask_OI, self.values.detach())

    def kept(self, dense: Tensor, *, transposed: bool = False) -> Tensor:
        """The entries of a dense tensor at the kept positions, as `values` has those of the weight.

        For what belongs to the dense weight that this layer came from: its gradient, an optimizer's moments.

        Args:
            dense: (out, in), any dtype.
            transposed: it is (in, out) instead, as for a Conv1D's weight.

        Returns:
            (out, in·n/m), a copy on the device and in the dtype of `dense`.

        Raises:
            ValueError: another shape.
        """
        dense_OI = dense.t() if transposed else dense
        if dense_OI.shape != (self.out_features, self.in_features):
            shape = tuple(dense_OI.shape)
            raise ValueError(f"a tensor of ({self.out_features}, {self.in_features}) is wanted, got {shape}")
        return dense_OI[self.row_mask().to(dense.device)].view(self.out_features, -1)

    def validate(self) -> None:
        """Check what is stored: W^R exactly N:M, W^{R,C} a part of it and at most N:M along the output features.

        Raises:
            ValueError: with the first rule that is broken.
        """
        row_OI, column_OI = self.row_mask(), self.column_mask()
        if not masks.is_nm(row_OI, self.n, self.m):
            raise ValueError(f"the stored positions are not exactly {self.n}:{self.m}")
        if (column_OI & ~row_OI).any():
            raise ValueError("the transposed positions keep an entry that the row mask prunes")
        if (column_OI.unflatten(0, (-1, self.m)).sum(1) > self.n).any():
            raise ValueError(f"the transposed positions keep more than {self.n} of {self.m}")

    def extra_repr(self) -> str:
        sides = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sides}, bias={self.bias is not None}, {self.n}:{self.m}"

"""The three products of a double-pruned layer in plain torch: any device, any dtype, any N:M.

This is what every faster backend is tested against, and what runs on a CPU.
Shape suffixes: B tokens, O out features, I in features, K = I·N/M kept entries of a row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_kernels.operands import Operand, column_sums, operand, product, rows_of, weight_operand


def scatter_kept(values_OK: Tensor, index_OK: Tensor, in_features: int) -> Tensor:
    """Kept entries to the dense matrix with its zeros: (O, K), int64 (O, K) -> (O, I)."""
    bits_OK = _as_bits(values_OK)
    dense_OI = bits_OK.new_zeros(values_OK.shape[0], in_features)
    return dense_OI.scatter_(1, index_OK, bits_OK).view(values_OK.dtype)


def _as_bits(values: Tensor) -> Tensor:
    """fp8 as uint8, whose 0 is the same, for what torch, or its compiler, does not do in fp8; others as they are."""
    return values.view(torch.uint8) if values.dtype.itemsize == 1 else values


def kept_columns(mask_OI: Tensor, n: int, m: int) -> Tensor:
    """The column of each kept entry of an exact N:M mask, ascending: bool (O, I) -> int64 (O, K).

    The host waits for nothing, unlike with `nonzero`: it can be captured in a CUDA graph.
    """
    kept_OGM = mask_OI.unflatten(1, (-1, m)).to(torch.uint8)
    places_OGN = kept_OGM.argsort(dim=-1, descending=True, stable=True)[..., :n]
    starts_G = torch.arange(0, mask_OI.shape[1], m, device=mask_OI.device)
    columns_OK: Tensor = (places_OGN + starts_G[:, None]).flatten(1)
    return columns_OK


def gather_kept(dense_OI: Tensor, index_OK: Tensor) -> Tensor:
    """The entries of a dense matrix at the kept positions: (O, I), int64 (O, K) -> (O, K)."""
    return dense_OI.gather(1, index_OK)


class _SparseLinear(torch.autograd.Function):
    """Builds the dense W^R and W^{R,C} where they are used, so neither is ever stale and neither is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        X_BI: Tensor,
        values_OK: Tensor,
        bias_O: Tensor | None,
        index_OK: Tensor,
        survives_OK: Tensor,
        counts: Tensor | None,
        for_weight_BI: Tensor | None,
    ) -> Tensor:
        fp8, of_X, _ = rows_of(counts)
        X = operand(X_BI, fp8=fp8, columns=ctx.needs_input_grad[1], counts=of_X)
        kept = weight_operand(values_OK, X_BI.dtype, fp8=fp8)
        X_IB = (X if for_weight_BI is None else Operand(for_weight_BI)).t()
        ctx.save_for_backward(X_IB.data, X_IB.scale, values_OK, index_OK, survives_OK, counts)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        W_OI = Operand(scatter_kept(kept.data, index_OK, X_BI.shape[1]), kept.scale)
        return product(X, W_OI, None if bias_O is None else bias_O.to(X_BI.dtype), dtype=X_BI.dtype)  # -> [B,O]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY_BO: Tensor) -> tuple[Tensor | None, ...]:
        data_IB, scale, values_OK, index_OK, survives_OK, counts = ctx.saved_tensors
        dtype, (needs_X, needs_values, needs_bias) = dY_BO.dtype, ctx.needs_input_grad[:3]
        fp8, _, of_dY = rows_of(counts)
        dY = operand(dY_BO, fp8=fp8, rows=needs_X, columns=needs_values, sums=needs_bias, counts=of_dY)
        dX_BI = dV_OK = dbias_O = None
        if needs_X:
            kept = weight_operand(values_OK, dtype, fp8=fp8)  # what survives has the scale of all
            passed_OK = kept.data
            if needs_values:
                passed_OK = (_as_bits(passed_OK) * survives_OK).view(passed_OK.dtype)
            W_OI = Operand(scatter_kept(passed_OK, index_OK, len(data_IB)), kept.scale)
            dX_BI = product(dY, W_OI.t(), dtype=dtype)  # [B,O] · [O,I] -> [B,I]
        if needs_values:
            dW_OI = product(dY.t(), Operand(data_IB, scale), dtype=dtype, exact=True)  # [O,B] · [B,I] -> [O,I]
            dV_OK = gather_kept(dW_OI, index_OK).to(values_OK.dtype)
        if needs_bias:
            dbias_O = column_sums(dY, dY_BO, ctx.bias_dtype)
        return dX_BI, dV_OK, dbias_O, None, None, None, None


def sparse_linear(
    X: Tensor,
    values_OK: Tensor,
    bias_O: Tensor | None,
    index_OK: Tensor,
    survives_OK: Tensor,
    counts: Tensor | None = None,
    for_weight_BI: Tensor | None = None,
) -> Tensor:
    """Y = X · W^R^T + bias, whose gradient with respect to X goes through W^{R,C} (equations 4.4-4.6).

    Frozen values use the exact W^R instead: double pruning is only needed while training.

    Args:
        X: (..., I); decides the dtype of the three products.
        values_OK: (O, K), the kept entries of W^R in column order; float32 or the dtype of X.
        bias_O: (O,) or None.
        index_OK: int64 (O, K), the column of each kept entry.
        survives_OK: bool (O, K), whether it is kept in W^{R,C} too.
        counts: int64 (2, 2), to round the operands of all three products to e4m3, and count; see operands.py. Or None.
        for_weight_BI: (B, I), what the values' gradient is computed with in place of X; then without counts. Or None.

    Returns:
        (..., O), the dtype of X.
    """
    X_BI = X if X.dim() == 2 else X.reshape(-1, X.shape[-1])
    Y_BO: Tensor = _SparseLinear.apply(X_BI, values_OK, bias_O, index_OK, survives_OK, counts, for_weight_BI)
    return Y_BO if X.dim() == 2 else Y_BO.view(*X.shape[:-1], len(values_OK))

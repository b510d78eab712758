"""The three products of a double-pruned layer in plain torch: any device, any dtype, any N:M.

This is what every faster backend is tested against, and what runs on a CPU.
Shape suffixes: B tokens, O out features, I in features, K = I·N/M kept entries of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def scatter_kept(values_OK: Tensor, index_OK: Tensor, in_features: int) -> Tensor:
    """Kept entries to the dense matrix with its zeros: (O, K), int64 (O, K) -> (O, I)."""
    dense_OI = values_OK.new_zeros(values_OK.shape[0], in_features)
    return dense_OI.scatter_(1, index_OK, values_OK)


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
        ctx: Any, X: Tensor, values_OK: Tensor, bias_O: Tensor | None, index_OK: Tensor, survives_OK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(X, values_OK, index_OK, survives_OK)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        W_OI = scatter_kept(values_OK.to(X.dtype), index_OK, X.shape[-1])
        return F.linear(X, W_OI, None if bias_O is None else bias_O.to(X.dtype))  # [B,I] · [O,I]^T -> [B,O]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        X, values_OK, index_OK, survives_OK = ctx.saved_tensors
        dX = dV_OK = dbias_O = None
        if ctx.needs_input_grad[0]:
            passed_OK = values_OK * survives_OK if ctx.needs_input_grad[1] else values_OK
            dX = dY @ scatter_kept(passed_OK.to(dY.dtype), index_OK, X.shape[-1])  # [B,O] · [O,I] -> [B,I]
        dY_BO = dY.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            dW_OI = dY_BO.t() @ X.flatten(0, -2)  # [O,B] · [B,I] -> [O,I]
            dV_OK = gather_kept(dW_OI, index_OK).to(values_OK.dtype)
        if ctx.needs_input_grad[2]:
            dbias_O = dY_BO.sum(0, dtype=ctx.bias_dtype)
        return dX, dV_OK, dbias_O, None, None


def sparse_linear(X: Tensor, values_OK: Tensor, bias_O: Tensor | None, index_OK: Tensor, survives_OK: Tensor) -> Tensor:
    """Y = X · W^R^T + bias, whose gradient with respect to X goes through W^{R,C} (equations 4.4-4.6).

    Frozen values use the exact W^R instead: double pruning is only needed while training.

    Args:
        X: (..., I); decides the dtype of the three products.
        values_OK: (O, K), the kept entries of W^R in column order; float32 or the dtype of X.
        bias_O: (O,) or None.
        index_OK: int64 (O, K), the column of each kept entry.
        survives_OK: bool (O, K), whether it is kept in W^{R,C} too.

    Returns:
        (..., O), the dtype of X.
    """
    X_BI = X if X.dim() > 1 else X.unsqueeze(0)
    Y_BO: Tensor = _SparseLinear.apply(X_BI, values_OK, bias_O, index_OK, survives_OK)
    return Y_BO if X.dim() > 1 else Y_BO.squeeze(0)

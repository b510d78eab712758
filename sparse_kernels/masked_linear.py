"""MaskedLinear: a dense weight, and what N:M sparse products read of it: the layer of SR-STE, FST, S-STE and Wanda.

    forward      Y[B,out]  = X[B,in] · P^T + bias                P[out,in] = W ⊙ mask, or with a scale beta · S(W)
    input grad   dX[B,in]  = dY[B,out] · P
    weight grad  dW[out,in] = dY[B,out]^T · X[B,in], straight through to pruned entries too; of mvue(dY) if asked for

Trained and stored dense: it saves neither time nor memory, and is what a sparse layer's quality is compared with.
SR-STE (arXiv 2102.04010) updates the mask by magnitude in every step, FST (2404.01847) now and then, transposable;
both pull pruned weights towards zero (`decay_pruned`). Wanda (arXiv 2306.11695) chooses it once, by weights and inputs.
S-STE (arXiv 2409.09099) has no mask to choose: S, soft thresholding, is a continuous function of W that is N:M.

Shape suffixes: B tokens, O out features, I in features.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import masks
from sparse_kernels.operands import Operand, column_sums, operand, product, rows_of, weight_operand
from sparse_kernels.sharded import local, local_rows


class _MaskedLinear(torch.autograd.Function):
    """Masks and rounds the weight where it is used, so no copy is kept from the forward pass to the backward one."""

    @staticmethod
    def forward(
        ctx: Any,
        X_BI: Tensor,
        W_OI: Tensor,
        bias_O: Tensor | None,
        mask_OI: Tensor | None,
        scale: Tensor | None,
        pattern: tuple[int, int],
        mvue: bool,
        straight_through: bool,
        counts: Tensor | None,
        for_weight_BI: Tensor | None,
    ) -> Tensor:
        fp8, of_X, _ = rows_of(counts)
        X = operand(X_BI, fp8=fp8, columns=ctx.needs_input_grad[1], counts=of_X)
        P = weight_operand(_projected(W_OI, mask_OI, scale, pattern), X_BI.dtype, fp8=fp8)
        X_IB = (X if for_weight_BI is None else Operand(for_weight_BI)).t()
        ctx.save_for_backward(X_IB.data, X_IB.scale, W_OI, mask_OI, scale, counts)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        ctx.pattern, ctx.mvue, ctx.straight_through = pattern, mvue, straight_through
        return product(X, P, None if bias_O is None else bias_O.to(X_BI.dtype), dtype=X_BI.dtype)  # -> [B,O]

    @staticmethod
    def backward(ctx: Any, dY_BO: Tensor) -> tuple[Tensor | None, ...]:
        data_IB, fp8_scale, W_OI, mask_OI, scale, counts = ctx.saved_tensors
        dtype, (needs_X, needs_W, needs_bias) = dY_BO.dtype, ctx.needs_input_grad[:3]
        fp8, _, of_dY = rows_of(counts)
        columns = needs_W and not ctx.mvue
        dY = operand(dY_BO, fp8=fp8, rows=needs_X, columns=columns, sums=needs_bias, counts=of_dY)
        dX = dW = db = None
        if needs_X:
            P_OI = _projected(W_OI, mask_OI, scale, ctx.pattern)
            dX = product(dY, weight_operand(P_OI, dtype, fp8=fp8, transposed=True).t(), dtype=dtype)  # [B,O] · [O,I]
        if needs_W:
            S = dY
            if ctx.mvue:
                n, m = ctx.pattern
                S = operand(masks.mvue(dY_BO, n, m, dim=0), fp8=fp8, rows=False, columns=True)
            dW = product(S.t(), Operand(data_IB, fp8_scale), dtype=dtype, exact=True)  # [O,B] · [B,I] -> [O,I]
            dW = dW.to(W_OI.dtype)
            if not ctx.straight_through:
                dW = _masked(dW, mask_OI)
        if needs_bias:
            db = column_sums(dY, dY_BO, ctx.bias_dtype)
        return dX, dW, db, None, None, None, None, None, None, None


def linear(
    X: Tensor,
    W_OI: Tensor,
    bias_O: Tensor | None,
    mask_OI: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    pattern: tuple[int, int] = (2, 4),
    mvue: bool = False,
    straight_through: bool = True,
    counts: Tensor | None = None,
    for_weight: Tensor | None = None,
) -> Tensor:
    """Y = X · P^T + bias with the gradients that this module's docstring states.

    Args:
        X: (..., I); its dtype, under autocast that of autocast, is that of the three products.
        W_OI: (O, I).
        bias_O: (O,) or None.
        mask_OI: bool (O, I), or None for no mask.
        scale: beta, () float32, for P = beta · S(W), whatever the mask; or None.
        pattern: (n, m), of S, and of `mvue`.
        mvue: prune dY n:m along the tokens, without bias, for the weight's gradient.
        straight_through: whether pruned entries have a gradient, too.
        counts: int64 (2, 2), to round the operands of all three products to e4m3, and count; see operands.py. Or None.
        for_weight: (B, I), what the weight's gradient is computed with in place of X; then without counts. Or None.

    Returns:
        (..., O).
    """
    device = X.device.type
    if torch.is_autocast_enabled(device):
        X = X.to(torch.get_autocast_dtype(device))
    X_BI = X if X.dim() == 2 else X.reshape(-1, X.shape[-1])
    how = scale, pattern, mvue, straight_through, counts, for_weight
    Y_BO: Tensor = _MaskedLinear.apply(X_BI, W_OI, bias_O, mask_OI, *how)
    return Y_BO if X.dim() == 2 else Y_BO.view(*X.shape[:-1], len(W_OI))


def _projected(W_OI: Tensor, mask_OI: Tensor | None, scale: Tensor | None, pattern: tuple[int, int]) -> Tensor:
    """P, in W's dtype."""
    return _masked(W_OI, mask_OI) if scale is None else masks.soft_threshold(W_OI, *pattern) * scale


def _masked(W_OI: Tensor, mask_OI: Tensor | None) -> Tensor:
    """W ⊙ mask; zero also where a pruned weight is not finite."""
    return W_OI if mask_OI is None else torch.where(mask_OI, W_OI, 0)


class MaskedLinear(nn.Module):
    """A linear layer whose dense, trained weight is multiplied by an N:M mask, or made N:M by soft thresholding.

    Attributes:
        weight: parameter (out, in), with the pruned entries, which are trained too.
        bias: parameter (out,) or None.
        mask: bool buffer (out, in); see `update_mask` and `remove_mask`. With a scale it multiplies nothing, and says
            where P may be other than zero.
        scale: float32 buffer () or None; see `masks.soft_scale`. It is fixed, and computed from the first weight.
        transposable: the mask is N:M along both sides.
        mvue: the weight's gradient is that of the output's gradient pruned N:M along the tokens, without bias.
        straight_through: pruned entries have a gradient, too; without one they stay as they are.
        unmasked: the mask was removed.
        fp8_counts: buffer int64 (2, 2), not saved, of a layer whose products in training have e4m3 operands, or None;
            see `sparse_kernels.set_fp8`.
        prunes_input: in training the input is pruned; see `sparse_kernels.defer_activations`.
        conv1d: the layer came from transformers' Conv1D, and `to_dense` makes it one again.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor
    scale: Tensor | None
    fp8_counts: Tensor | None

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        n: int,
        m: int,
        *,
        score_OI: Tensor | None = None,
        transposable: bool = False,
        mvue: bool = False,
        straight_through: bool = True,
        soft_threshold: bool = False,
        conv1d: bool = False,
    ) -> None:
        """Copy a dense weight (out, in) and bias (out,) or None.

        Args:
            score_OI: (out, in), the first mask keeps its largest; None for the weight's magnitudes.
            soft_threshold: have a `scale`, from this weight.

        Raises:
            ValueError: a side is no multiple of m, not 0 < n < m, or m > 4 and transposable.
        """
        super().__init__()
        self.n, self.m, self.transposable, self.mvue, self.conv1d = n, m, transposable, mvue, conv1d
        self.straight_through, self.unmasked, self.prunes_input = straight_through, False, False
        self.out_features, self.in_features = weight_OI.shape
        if self.out_features % m or self.in_features % m:
            raise ValueError(f"sides {self.out_features} x {self.in_features} are not multiples of m={m}")
        self.weight = nn.Parameter(weight_OI.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().clone())
        self.register_buffer("fp8_counts", None, persistent=False)
        self.register_buffer("mask", self._choose(self.weight.detach().abs() if score_OI is None else score_OI))
        self.register_buffer("scale", masks.soft_scale(self.weight.detach(), n, m) if soft_threshold else None)

    def forward(self, X: Tensor) -> Tensor:
        """(..., in) -> (..., out); under autocast the products run in the autocast dtype, as nn.Linear's do."""
        counts = self.fp8_counts if self.training else None
        how: dict[str, Any] = {"scale": self.scale, "pattern": (self.n, self.m), "mvue": self.mvue}
        how |= {"straight_through": self.straight_through, "counts": counts}
        if self.prunes_input and self.training:
            X, how["for_weight"] = masks.prune_features(X), masks.prune_tokens(X)
        return linear(X, self.weight, self.bias, self.mask, **how)

    @property
    def masked_weight(self) -> Tensor:
        """P, the weight of both products: (out, in); a derived copy."""
        return _projected(self.weight, self.mask, self.scale, (self.n, self.m))

    def local_masked_weight(self) -> Tensor:
        """The rows of P that this process has."""
        mask_RI = self.mask[local_rows(self.weight)]
        return _projected(local(self.weight), mask_RI, self.scale, (self.n, self.m))

    @torch.no_grad()
    def update_mask(self) -> None:
        """Choose the mask again from the present magnitudes, in place; does nothing once the mask is removed."""
        if not self.unmasked:
            self.mask.copy_(self.chosen(self.weight))

    def chosen(self, weight_RI: Tensor) -> Tensor:
        """The mask that magnitudes choose for some rows of a weight, whole groups of m: bool, of the same shape."""
        return self._choose(weight_RI.abs())

    def remove_mask(self) -> None:
        """Remove the mask for good, in place, and compute exact gradients: from now on an ordinary linear layer.

        A checkpoint saves only the mask: call this again after reading one.
        """
        self.mask.fill_(True)
        self.unmasked, self.mvue, self.scale = True, False, None

    @torch.no_grad()
    def fix_mask(self) -> None:
        """Keep the mask as it is for good: pruned entries have no gradient from now on, and the others an exact one.

        A weight that soft thresholding made N:M becomes what it made, in place.
        """
        if self.scale is not None:
            self.weight.copy_(self.masked_weight)
        self.straight_through, self.mvue, self.scale = False, False, None

    def _choose(self, score_OI: Tensor) -> Tensor:
        choose = masks.transposable_mask if self.transposable else masks.nm_mask
        return choose(score_OI, self.n, self.m)

    def extra_repr(self) -> str:
        sides = f"in_features={self.in_features}, out_features={self.out_features}"
        names = [name for name in ("transposable", "mvue", "unmasked") if getattr(self, name)]
        also = "".join(f", {name}" for name in (*names, *["soft_threshold"] * (self.scale is not None)))
        return f"{sides}, bias={self.bias is not None}, {self.n}:{self.m}{also}"


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLinear]]:
    """(name, layer) of every MaskedLinear in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MaskedLinear))


def remove_masks(model: nn.Module) -> None:
    """Remove the mask of every MaskedLinear for good; see `MaskedLinear.remove_mask`."""
    for _, layer in masked_layers(model):
        layer.remove_mask()


@torch.no_grad()
def decay_pruned(model: nn.Module, decay: float) -> None:
    """Add decay · W to the gradient of every MaskedLinear where its mask prunes, in place.

    SR-STE's decay, as FST has it: in the gradient, so that Adam normalises it too. After the backward pass and before
    the optimizer's step; before clipping, it is clipped as well. A CUDA graph that captures it keeps `decay` as it was.
    """
    for _, layer in masked_layers(model):
        if layer.weight.grad is not None:  # where a process has some rows of it, each decays its own
            weight_RI, kept_RI = local(layer.weight), layer.mask[local_rows(layer.weight)]
            local(layer.weight.grad).add_(weight_RI.masked_fill(kept_RI, 0), alpha=decay)

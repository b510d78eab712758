"""The recurrent form: one token of a sliding window at a time, the memory updated in place.

It computes what `attend` computes for a chunk of one, but reads each remembered number once. A terrace, whose window
loses a block at a time, and decoding with gradients go through `attend`.

Shape suffixes: B sequences, H query heads, G KV heads, P query heads for each KV head, W remembered keys, K = W + 1,
D head dimension, E = D + 1 (values and a column of ones), F features; 1 is the new token.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from slope_cli.linearize.cache import LinearWindowCache, Ring, absorb_oldest, replace_oldest
from slope_cli.linearize.delta import mixed
from slope_cli.linearize.linear_attention import Branch, Maps, exp_below_max, normalised


def decode(
    q_BH1D: Tensor,
    k_BG1D: Tensor,
    v_BG1D: Tensor,
    keep_B1: Tensor | None,
    mix_H: Tensor | None,
    maps: Maps,
    scale: float,
    memory: LinearWindowCache,
    branch: Branch,
    *,
    compiled: bool = False,
) -> Tensor:
    """y (B, H, 1, D) of one new token, float32 (float64 if k is); `memory` then remembers the token.

    keep_B1: bool, False where the token is padding; None if it is none. mix_H: None for the delta rule. The others as
    in `attend`.
    """
    step, ring = _compiled_step() if compiled else _step, memory.ring()
    keep_B1 = memory.keep_BW.new_ones(len(q_BH1D), 1) if keep_B1 is None else keep_B1
    if compiled:  # once for all batches but that of one
        for tensor in (q_BH1D, k_BG1D, v_BG1D, keep_B1, ring.keys, ring.values, ring.keep, ring.state):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    with torch.autocast(q_BH1D.device.type, enabled=False):
        y_BH1D = step(q_BH1D, k_BG1D, v_BG1D, keep_B1, mix_H, maps, scale, ring, branch)
        replace_oldest(ring, k_BG1D, v_BG1D, keep_B1)  # a compiler would copy the whole ring for it
    memory.seen += 1
    return y_BH1D


def _step(
    q_BH1D: Tensor,
    k_BG1D: Tensor,
    v_BG1D: Tensor,
    keep_B1: Tensor,
    mix_H: Tensor | None,
    maps: Maps,
    scale: float,
    ring: Ring,
    branch: Branch,
) -> Tensor:
    (B, H, _, D), G, dtype = q_BH1D.shape, k_BG1D.shape[1], ring.state.dtype
    q_BH1D = q_BH1D.to(dtype)
    q_BGPD = q_BH1D.reshape(B, G, -1, D)
    keep_BK = torch.cat([ring.keep, keep_B1], dim=1)
    scores_BGPK = torch.cat([_product(q_BGPD, ring.keys.mT), _product(q_BGPD, k_BG1D.mT)], dim=-1)
    near_BGPK = exp_below_max(scale * scores_BGPK, keep_BK[:, None, None])
    if mix_H is not None:
        near_BGPK = near_BGPK * mix_H.to(dtype).view(G, -1, 1)
    y_BGPD = _product(near_BGPK[..., :-1], ring.values) + near_BGPK[..., -1:] * v_BG1D.to(dtype)
    near_BGPE = torch.cat([y_BGPD, near_BGPK.sum(-1, keepdim=True)], dim=-1)
    scaled_BH1D = q_BH1D * (scale * D**0.5)
    far_BGPE = _product(maps.q(scaled_BH1D).reshape(B, G, H // G, -1), ring.state)
    if maps.share is None:
        y_BH1D = normalised(near_BGPE, far_BGPE, branch).reshape(B, H, 1, D)
    else:
        y_BH1D = normalised(near_BGPE, None, branch).reshape(B, H, 1, D)
        y_BH1D = mixed(y_BH1D, far_BGPE.reshape(B, H, 1, D), maps.share(scaled_BH1D), branch)
    absorb_oldest(ring, maps)
    return y_BH1D


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left (…, P, I) times right (…, I, J), in left's precision.

    To a compiler it is a reduction: it reads `right` as it is and casts on the way. A matrix product would copy the
    whole memory into float32.
    """
    if torch.compiler.is_compiling():
        return (left[..., None] * right[..., None, :, :]).sum(-2)
    return left @ right.to(left.dtype)


@functools.cache
def _compiled_step() -> Callable[..., Tensor]:
    """One function for all layers."""
    return torch.compile(_step, fullgraph=True)

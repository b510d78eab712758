"""The recurrent form: one token of a sliding window, what is remembered changed in place.

It computes what `attend` computes for a chunk of one, but reads each remembered number once. A terrace, whose window
loses a block at a time, and decoding with gradients go through `attend`.

Shape suffixes: B sequences, H query heads, G KV heads, P query heads for each KV head, W remembered keys, K = W + 1,
D head dimension, E = D + 1 (values and a column of ones), F features; 1 is the new token.
"""

import torch
from torch import Tensor

from slope_cli.linearize.attention import Maps, exp_below_max, normalised
from slope_cli.linearize.cache import LinearWindowCache
from slope_cli.linearize.settings import Branch


def decode(
    q_BH1D: Tensor,
    k_BG1D: Tensor,
    v_BG1D: Tensor,
    keep_B1: Tensor | None,
    mix_H: Tensor,
    maps: Maps,
    scale: float,
    memory: LinearWindowCache,
    branch: Branch,
) -> Tensor:
    """y (B, H, 1, D) of one new token, float32 (float64 if k is); `memory` then remembers the token.

    keep_B1: bool, False where the token is padding; None if it is none. The others as in `attend`.
    """
    state_BGFE, k_BGWD, v_BGWD = memory.state_BGFE, memory.keys, memory.values
    assert k_BGWD is not None
    assert v_BGWD is not None
    (B, H, _, D), G, dtype = q_BH1D.shape, k_BG1D.shape[1], state_BGFE.dtype
    with torch.autocast(q_BH1D.device.type, enabled=False):
        q_BH1D = q_BH1D.to(dtype)
        q_BGPD = q_BH1D.reshape(B, G, -1, D)
        keep_B1 = memory.keep_BW.new_ones(B, 1) if keep_B1 is None else keep_B1
        keep_BK = torch.cat([memory.keep_BW, keep_B1], dim=1)
        scores_BGPK = torch.cat([q_BGPD @ k_BGWD.to(dtype).mT, q_BGPD @ k_BG1D.to(dtype).mT], dim=-1)
        gamma_GP1 = mix_H.to(dtype).view(G, -1, 1)
        near_BGPK = gamma_GP1 * exp_below_max(scale * scores_BGPK, keep_BK[:, None, None])
        y_BGPD = near_BGPK[..., :-1] @ v_BGWD.to(dtype) + near_BGPK[..., -1:] * v_BG1D.to(dtype)
        near_BGPE = torch.cat([y_BGPD, near_BGPK.sum(-1, keepdim=True)], dim=-1)
        phi_q_BGPF = maps.q(q_BH1D * (scale * D**0.5)).reshape(B, G, H // G, -1)
        y_BGPD = normalised(near_BGPE, phi_q_BGPF @ state_BGFE, branch)
        memory.push(k_BG1D, v_BG1D, keep_B1, maps.k)
    return y_BGPD.reshape(B, H, 1, D)

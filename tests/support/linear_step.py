"""What a layer's heads have learned and what rows remember, at random, and a step of linearized attention as defined.

Shape suffixes: B rows, H query heads, G KV heads, S = H + 2 G, P query heads for each KV head, W remembered keys,
K = W + 1, D head dimension, M columns of a feature map, F features, E = D + 1.
"""

import torch
from torch import Tensor

from sparse_kernels.attention import turned_heads
from sparse_kernels.linear_attention import Heads, Memory


def random_heads(
    heads: int, kv_heads: int, dim: int, columns: int, *, relu: bool, gated: bool, size: float = 1.0
) -> Heads:
    """Maps whose products with a random vector have about this size, on the CPU."""
    maps = [torch.randn(count, dim, columns) * size * dim**-0.5 for count in (heads, kv_heads)]
    biases = [torch.randn(count, columns) if relu else None for count in (heads, kv_heads)]
    gates = (torch.randn(kv_heads, dim) * dim**-0.5, torch.randn(kv_heads)) if gated else (None, None)
    return Heads(*maps, *biases, torch.rand(heads), *gates)


def random_memory(rows: int, heads: Heads, window: int, dtype: torch.dtype, kept: float) -> Memory:
    """Of rows in the middle of a text, this share of whose remembered keys are real; for 0 of rows that begin."""
    G, D, _ = heads.map_k.shape
    keys, values = torch.randn(2, rows, G, window, D).to(dtype)
    seen, given = torch.rand(rows, G, 30, heads.features) * (kept > 0), torch.randn(rows, G, 30, D + 1)
    given[..., -1] = 1
    return Memory(keys, values, torch.rand(rows, window) < kept, seen.mT @ given, torch.randint(window, (1,)))


def random_rotary(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(2, B, D), as `attention.turn` takes it."""
    angles, signs = torch.rand(rows, dim // 2).repeat(1, 2) * 6, torch.ones(dim)
    signs[: dim // 2] = -1
    return torch.stack([angles.cos(), angles.sin() * signs]).to(dtype)


def of(kind: torch.dtype | str, *tensors: Tensor | None) -> list[Tensor | None]:
    """Copies on this device, or where they are not integers or bool in this dtype."""
    floating = isinstance(kind, str)
    return [
        None if t is None else t.to(kind, copy=True) if floating or t.is_floating_point() else t.clone()
        for t in tensors
    ]


def step_as_defined(qkv_BSD: Tensor, rotary: Tensor | None, memory: Memory, heads: Heads, scale: float) -> Tensor:
    """`linear_attention.attend_new_tokens` in plain torch, in the precision of what it is given."""
    (B, G, _, D), H = memory.keys.shape, len(heads.map_q)
    q_BHD, k_BGD, v_BGD = turned_heads(qkv_BSD, rotary, G)
    keys_BGKD, values_BGKD = (
        torch.cat([old, new[:, :, None]], dim=2) for old, new in ((memory.keys, k_BGD), (memory.values, v_BGD))
    )
    keep_BK = torch.cat([memory.keep, memory.keep.new_ones(B, 1)], dim=1)
    scores_BGPK = scale * q_BHD.view(B, G, -1, D) @ keys_BGKD.mT  # [B,G,P,D] · [B,G,K,D]^T -> [B,G,P,K]
    scores_BGPK = scores_BGPK.masked_fill(~keep_BK[:, None, None], -torch.inf)
    near_BGPK = (scores_BGPK - scores_BGPK.amax(-1, keepdim=True)).exp() * heads.mix.view(G, -1, 1)
    phi_q_BGPF = _features(q_BHD * scale * D**0.5, heads.map_q, heads.bias_q).view(B, G, H // G, -1)
    total_BGPE = near_BGPK @ _with_ones(values_BGKD) + phi_q_BGPF @ memory.state

    at = int(memory.oldest)
    old_BGD, keep_B1 = memory.keys[:, :, at], memory.keep[:, at, None]
    if heads.gate is not None and heads.gate_bias is not None:
        log_BG = -((old_BGD * heads.gate).sum(-1) + heads.gate_bias).relu() * keep_B1
        memory.state.mul_(log_BG.exp()[..., None, None])
    phi_BGF = _features(old_BGD, heads.map_k, heads.bias_k) * keep_B1[..., None]
    memory.state.add_(phi_BGF[..., None] * _with_ones(memory.values[:, :, at])[:, :, None])
    memory.keys[:, :, at], memory.values[:, :, at], memory.keep[:, at] = k_BGD, v_BGD, True
    memory.oldest.add_(1).remainder_(memory.keys.shape[2])
    return (total_BGPE[..., :-1] / total_BGPE[..., -1:]).view(B, H, D)


def _features(x_BHD: Tensor, map_HDM: Tensor, bias_HM: Tensor | None) -> Tensor:
    z_BHM = (x_BHD[:, :, None] @ map_HDM).squeeze(2)  # [B,H,1,D] · [H,D,M] -> [B,H,1,M]
    if bias_HM is None:
        return torch.cat([z_BHM.softmax(-1), (-z_BHM).softmax(-1)], dim=-1).clamp(min=1e-12)
    return (z_BHM + bias_HM).relu().clamp(min=1e-12)


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)

"""Preallocated keys and values: prompts are stored there, and single new tokens, one for each row, attend over them.

Shape suffixes: B rows, P prompts (of T tokens), H query heads, G KV heads, P query heads for each KV head (H = G·P) in
decode_attention, S = H + 2 G, T places, D head dimension.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import cuda, driver

SOURCE = Path(__file__).with_name("decode_attention.cu")
_THREADS = 128
_BLOCKS = 4  # of the kernel on a multiprocessor
_FEWEST_KEYS = 64  # that are worth a block


def turn(X: Tensor, rotary: Tensor) -> Tensor:
    """Heads (…, H, D) turned by their positions: the pairs that are turned are a head's first half and its second.

    rotary: (2, …, D) cosines, and sines of which the first half is negated.
    """
    cos, sin = rotary.unsqueeze(-2)
    return torch.addcmul(X * cos, X.roll(X.shape[-1] // 2, dims=-1), sin)


def turned_heads(qkv: Tensor, rotary: Tensor | None, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (…, H or G, D) of (…, H + 2 G, D), turned by their positions unless `rotary` is None."""
    heads = qkv.shape[-2] - 2 * kv_heads
    turned, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
    if rotary is not None:
        turned = turn(turned, rotary)
    q, k = turned.split([heads, kv_heads], dim=-2)
    return q, k, v


def remember_prompts(
    qkv_PTSD: Tensor, rotary: Tensor | None, keys_BGTD: Tensor, values_BGTD: Tensor, slots_P: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The turned queries, keys and values of whole prompts, (P, T, H or G, D), stored in their slots from place 0 on.

    One launch on a GPU with 16-bit types, in place.

    Args:
        qkv_PTSD: the queries of H heads, then the keys and values of G heads; may be changed.
        rotary: (2, P, T, D), as `turn` takes it; None for none.
        slots_P: int64, the row of keys and values that each prompt has.
    """
    T, S, G = *qkv_PTSD.shape[1:3], keys_BGTD.shape[1]
    if cuda.takes(qkv_PTSD):
        cuda.remember(qkv_PTSD, rotary, keys_BGTD, values_BGTD, slots_P, S - 2 * G)
        return turned_heads(qkv_PTSD, None, G)
    q_PTHD, k_PTGD, v_PTGD = turned_heads(qkv_PTSD, rotary, G)
    for kept_BGTD, new_PTGD in ((keys_BGTD, k_PTGD), (values_BGTD, v_PTGD)):
        kept_BGTD[:, :, :T].index_copy_(0, slots_P, new_PTGD.transpose(1, 2))
    return q_PTHD, k_PTGD, v_PTGD


def decode_attention(
    q_BHD: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor, lengths_B: Tensor, scale: float, window: int = 0
) -> Tensor:
    """Softmax attention of one query token for each row, over the keys that this row has: (B, H, D) in q's dtype.

    No shape depends on the data, and the host reads nothing of the device: a CUDA graph can hold it.

    Args:
        keys_BGTD, values_BGTD: of T places, of which row b has filled the first lengths_B[b].
        lengths_B: int32, on the device, from 1 to T; the query's own key is the last of them.
        window: only the last `window` keys are seen; 0 for all.
    """
    (B, H, D), (G, T) = q_BHD.shape, keys_BGTD.shape[1:3]
    places_T, ends_B1 = torch.arange(T, device=q_BHD.device), lengths_B[:, None]
    seen_BT = places_T < ends_B1
    if window:
        seen_BT &= places_T >= ends_B1 - window
    q_BGPD = q_BHD.view(B, G, H // G, D)
    scores_BGPT = scale * (q_BGPD @ keys_BGTD.mT).float()  # [B,G,P,D] · [B,G,T,D]^T -> [B,G,P,T]
    weights_BGPT = scores_BGPT.masked_fill(~seen_BT[:, None, None], -torch.inf).softmax(-1).to(q_BHD.dtype)
    return (weights_BGPT @ values_BGTD).view(B, H, D)  # [B,G,P,T] · [B,G,T,D] -> [B,G,P,D]


def attend_new_tokens(
    qkv_BSD: Tensor,
    rotary: Tensor | None,
    keys_BGTD: Tensor,
    values_BGTD: Tensor,
    places_B: Tensor,
    scale: float,
    window: int = 0,
    space: Tensor | None = None,
) -> Tensor:
    """Turn the new tokens' queries and keys, store their keys and values, and attend: (B, H, D).

    One launch on a GPU with 16-bit types, which reads no more keys than each row has; fit for a CUDA graph. Places and
    what was remembered are read before the kernel in front has ended: that must not be one that writes them.

    Args:
        qkv_BSD: the queries of a row's H heads, then the keys and values of its G heads.
        rotary: (2, B, D), as `turn` takes it, for each row's place; None for none.
        keys_BGTD, values_BGTD: row b has filled the first places_B[b] of T places; the new token gets the next.
        places_B: int32, on the device, from 0 to T - 1.
        window: only the last `window` keys are seen, the new one included; 0 for all.
        space: `attention_space` of these sides, which no other stream uses; None for a new one.
    """
    B, G, T, D = keys_BGTD.shape
    H = qkv_BSD.shape[1] - 2 * G
    if not _kernel_takes(qkv_BSD, H // G):
        q_BHD, k_BGD, v_BGD = turned_heads(qkv_BSD, rotary, G)
        rows_B, at_B = torch.arange(B, device=qkv_BSD.device), places_B.long()
        keys_BGTD[rows_B, :, at_B], values_BGTD[rows_B, :, at_B] = k_BGD, v_BGD
        return decode_attention(q_BHD, keys_BGTD, values_BGTD, places_B + 1, scale, window)
    splits, space = _splits(B, G, T, qkv_BSD.device), attention_space(keys_BGTD, H) if space is None else space
    out_BHD = qkv_BSD.new_empty(B, H, D)
    operands = (qkv_BSD.contiguous(), rotary, keys_BGTD, values_BGTD, places_B, out_BHD, space)
    arguments = (*map(driver.address, operands), B, G, T, window, float(scale))
    function = _function(qkv_BSD.dtype == torch.float16, D, H // G, splits, qkv_BSD.device.index)
    driver.launch_early(function, (B, G, splits), _THREADS, qkv_BSD.device, arguments)
    return out_BHD


def attention_space(keys_BGTD: Tensor, heads: int) -> Tensor:
    """What `attend_new_tokens` needs beside its operands for at most these rows: float32, zero before and after."""
    B, G, T, D = keys_BGTD.shape
    device = keys_BGTD.device
    if device.type != "cuda":
        return torch.zeros(0, device=device)
    most = max(rows * _splits(rows, G, T, device) for rows in range(1, B + 1))
    return torch.zeros(B * G + most * heads * (D + 2), device=device)


def _kernel_takes(qkv_BSD: Tensor, shared: int) -> bool:
    """shared: query heads of a KV head."""
    dim = qkv_BSD.shape[2]
    return cuda.supports(qkv_BSD) and dim % 8 == 0 and dim <= 256 and shared <= 8


def _splits(rows: int, kv_heads: int, places: int, device: torch.device) -> int:
    """Into how many parts, a power of two, a row's keys are split: enough to fill the GPU."""
    wanted = _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count / (rows * kv_heads)
    most = min(wanted, places / _FEWEST_KEYS, 64)
    return 1 << max(0, int(most).bit_length() - 1)


@functools.cache
def _function(half: bool, dim: int, shared: int, splits: int, device_index: int) -> Any:
    definitions = {"HALF": int(half), "D": dim, "P": shared, "KV_SPLITS": splits}
    return driver.compiled(SOURCE, {"decode_attention": 0}, definitions, device_index)["decode_attention"]

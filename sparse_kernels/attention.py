"""Attention of single new tokens, one for each row of a batch, over preallocated keys and values.

Shape suffixes: B rows, H query heads, G KV heads, P query heads for each KV head (H = G·P), T places, D head dimension.
"""

import torch
from torch import Tensor


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

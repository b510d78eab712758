"""The gate of a gated state: by how much each key that joins the state decays what is in it.

    S = g_j · S + phi_k(k_j)^T · [v_j, 1]        g_j = exp(-relu(w·k_j + b)), between 0 and 1

So numerators and denominators decay alike, and the newest far key always counts in full. Scalar gates that depend on
the data are those of GLA (arXiv 2312.06635) and of Mamba-2 (arXiv 2405.21060), whose step size has a softplus where
this has a relu: with it a gate can be 1, and is with w = b = 0, the start. Gates of keys are as in Liger
(arXiv 2503.01496), here after rotary positions: the window remembers the keys as attention reads them, and a decoder
need remember nothing else.

Shape suffixes: B sequences, G KV heads, S keys, D head dimension, C queries.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gate(nn.Module):
    """The logarithm of each key's g, (B, G, S, D) -> (B, G, S), in the precision of the keys; 0 at first."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, k_BGSD: Tensor) -> Tensor:
        """log g of each key."""
        x_BGS1 = k_BGSD @ self.weight.to(k_BGSD.dtype)[..., None] + self.bias.to(k_BGSD.dtype)[:, None, None]
        # Not relu: its gradient at 0, where all keys are at first, is 0, and that of clamp is 1.
        return -x_BGS1.squeeze(-1).clamp(min=0)


def decays(log_gates: Tensor, far: Tensor) -> Tensor:
    """What is left, for each query, of what the state was before each key: (…, C, S + 1), the last of them 1.

    Products of gates as sums of logarithms, none of which is positive: nothing overflows, and nothing is divided.

    Args:
        log_gates: (…, 1, S), 0 for padding.
        far: (…, C, S), True for the keys that are far, which come before all others.
    """
    sums = (log_gates * far).flip(-1).cumsum(-1).flip(-1)
    return F.pad(sums, (0, 1)).exp()

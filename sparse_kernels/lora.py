"""Low-rank adapters: the module, and the dense layer that has one.

Shape suffixes: O out features, I in features, R adapter rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankAdapter(nn.Module):
    """scale · (X · A^T) · B^T with A (rank, in), B (out, rank) and scale = alpha / rank.

    B starts at zero, so a new adapter changes nothing. A is drawn from `generator`: for init "lora" Kaiming-uniform, as
    in PEFT's LoRA, which an exported adapter becomes, and alpha is the rank if not given; for "gaussian", the SLoPe
    paper's, from N(0, 1), and alpha is 1 if not given.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        init: str = "lora",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Raises:
            ValueError: a rank out of range, or another init.
        """
        super().__init__()
        if init not in ("lora", "gaussian"):
            raise ValueError(f"an adapter's init must be 'lora' or 'gaussian', got {init!r}")
        if not 0 < rank <= min(in_features, out_features):
            raise ValueError(f"rank must be between 1 and {min(in_features, out_features)}, got {rank}")
        self.rank = rank
        own_alpha = rank if init == "lora" else 1
        self.scale = (own_alpha if alpha is None else alpha) / rank
        A_RI, bound = torch.empty(rank, in_features), 1 / math.sqrt(in_features)  # on the CPU: same on any device
        if init == "lora":
            A_RI.uniform_(-bound, bound, generator=generator)
        else:
            A_RI.normal_(generator=generator)
        self.A = nn.Parameter(A_RI.to(device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))

    def forward(self, X: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        A_RI: Tensor = self.A
        B_OR: Tensor = self.B
        if more := -self.rank % 16:  # a side of 12, say, keeps a GPU's products from the tensor cores' fast paths
            A_RI, B_OR = F.pad(A_RI, (0, 0, 0, more)), F.pad(B_OR, (0, more))
        return F.linear(self.scale * F.linear(X, A_RI), B_OR)  # [B,I]·[R,I]^T -> [B,R];  [B,R]·[O,R]^T -> [B,O]

    def delta(self) -> Tensor:
        """The dense matrix this adapter adds to the layer's weight: (out, in)."""
        return self.scale * (self.B @ self.A)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


class AdaptedLinear(nn.Module):
    """A dense linear layer with a low-rank adapter beside it; weight and bias keep the names and the layout they had.

    Attributes:
        weight: parameter (out, in), or (in, out) if `conv1d`.
        bias: parameter (out,) or None.
        conv1d: the layer came from transformers' Conv1D.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, adapter: LowRankAdapter, *, conv1d: bool = False
    ) -> None:
        """Take over the parameters of a layer: these, not copies."""
        super().__init__()
        self.weight, self.conv1d = weight, conv1d
        self.register_parameter("bias", bias)
        self.adapter = adapter

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.conv1d else 0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self.conv1d else 1]

    def forward(self, X: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight_OI = self.weight.t() if self.conv1d else self.weight
        Y: Tensor = F.linear(X, weight_OI, self.bias) + self.adapter(X)
        return Y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

"""Low-rank adapters: the module, and a dense layer that has one.

Shape suffixes: B tokens, O out features, I in features, R adapter rank.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_kernels.deprecated import rename_saved, renamed


class LowRankAdapter(nn.Module):
    """scaling · (X · A^T) · B^T with A (rank, in), B (out, rank) and scaling = alpha / rank (LoRA, arXiv 2106.09685).

    B starts at zero, so a new adapter changes nothing. A is drawn from `generator`: for init "lora" Kaiming-uniform, as
    in PEFT's LoRA, with alpha = rank by default; for "gaussian", as in the SLoPe paper's code, from N(0, 1), with
    alpha = 1 by default.

    Attributes:
        lora_A, lora_B: parameters (rank, in) and (out, rank).
        scaling: alpha / rank.
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
            ValueError: a rank out of range, or an unknown init.
        """
        super().__init__()
        if init not in ("lora", "gaussian"):
            raise ValueError(f"an adapter's init must be 'lora' or 'gaussian', got {init!r}")
        if not 0 < rank <= min(in_features, out_features):
            raise ValueError(f"rank must be between 1 and {min(in_features, out_features)}, got {rank}")
        self.rank = rank
        default_alpha = rank if init == "lora" else 1
        self.scaling = (default_alpha if alpha is None else alpha) / rank
        on_meta = device is not None and torch.device(device).type == "meta"
        A_RI = torch.empty(rank, in_features, device="meta" if on_meta else "cpu")  # the same numbers for every device
        bound = 1 / math.sqrt(in_features)
        if init == "lora":
            A_RI.uniform_(-bound, bound, generator=None if on_meta else generator)
        else:
            A_RI.normal_(generator=None if on_meta else generator)
        self.lora_A = nn.Parameter(A_RI.to(device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))

    def forward(self, X: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        A_RI: Tensor = self.lora_A
        B_OR: Tensor = self.lora_B
        if padding := -self.rank % 16:  # a rank of 12, say, keeps a GPU's products off the fast paths
            A_RI, B_OR = F.pad(A_RI, (0, 0, 0, padding)), F.pad(B_OR, (0, padding))
        return F.linear(self.scaling * F.linear(X, A_RI), B_OR)  # [B,I]·[R,I]^T -> [B,R];  [B,R]·[O,R]^T -> [B,O]

    def delta(self) -> Tensor:
        """The dense matrix that the adapter adds to its layer's weight: (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)  # [O,R] · [R,I] -> [O,I]

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_saved(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    A, B, scale = renamed("A", "lora_A"), renamed("B", "lora_B"), renamed("scale", "scaling")


class AdaptedLinear(nn.Module):
    """A dense linear layer with a low-rank adapter; weight and bias keep their names and their layout.

    Attributes:
        weight: parameter (out, in), or (in, out) if `conv1d`.
        bias: parameter (out,) or None.
        adapter: a LowRankAdapter; its output is added.
        conv1d: the layer was a transformers Conv1D.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, adapter: LowRankAdapter, *, conv1d: bool = False
    ) -> None:
        """Take over a layer's own parameters, not copies."""
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
        Y: Tensor = F.linear(X, weight_OI, self.bias) + self.adapter(X)  # [B,I] · [O,I]^T -> [B,O]
        return Y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

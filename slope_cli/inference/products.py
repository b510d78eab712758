"""The linear layers of a decoder as it runs them: layers that read the same input are one product, dense or 2:4.

Shape suffixes: B tokens, O out features, I in features, R ranks of all adapters, r the largest of them.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_kernels import SparseLinear
from sparse_kernels.packed_linear import PackedLinear, Segments, adapter_of, dense_weight, fused_adapters, stacked


def product(layers: Sequence[nn.Module], dtype: torch.dtype, device: torch.device, *, sparse: bool) -> nn.Module:
    """One layer, (B, I) -> (B, O) plus a residual, of those that read the same input, their outputs side by side.

    Args:
        layers: linear layers of any kind here or of transformers, with or without adapters.
        sparse: a PackedLinear where all of them are 2:4; else W^R is multiplied as a dense weight.
    """
    if sparse and all(_is_packed(layer) for layer in layers):
        return PackedLinear.fuse(layers, dtype).to(device)
    return DenseLinear(layers, dtype, device)


class DenseLinear(nn.Module):
    """A dense linear layer, or several stacked by rows, with their adapters; never trained.

    Attributes:
        weight, bias: buffers (O, I), and (O,) or None.
        lora_A, lora_B, segments: as PackedLinear has them.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None

    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
        """Read the layers. A weight that needs neither a cast nor stacking is shared with its layer, not copied."""
        super().__init__()
        weights = [dense_weight(layer).detach().to(device, dtype) for layer in layers]
        adapters = [adapter_of(layer, len(weight)) for layer, weight in zip(layers, weights, strict=True)]
        self.segments: Segments = tuple(segment for _, segments in adapters for segment in segments)
        lora_A, lora_B = stacked(adapters, weights[0], weights[0].shape[1])
        biases: list[Tensor] = []
        for layer, weight in zip(layers, weights, strict=True):
            bias = cast(Tensor | None, layer.bias)
            biases.append(weight.new_zeros(len(weight)) if bias is None else bias.detach().to(device, dtype))
        self.register_buffer("weight", weights[0] if len(weights) == 1 else torch.cat(weights))
        self.register_buffer("bias", torch.cat(biases) if any(layer.bias is not None for layer in layers) else None)
        self.register_buffer("lora_A", lora_A)
        self.register_buffer("lora_B", lora_B)

    def forward(self, X_BI: Tensor, residual_BO: Tensor | None = None) -> Tensor:
        """(B, I) -> (B, O), plus the residual."""
        if residual_BO is None or self.bias is not None:
            Y_BO = F.linear(X_BI, self.weight, self.bias)  # [B,I] · [O,I]^T -> [B,O]
            Y_BO = Y_BO if residual_BO is None else Y_BO + residual_BO
        else:
            Y_BO = torch.addmm(residual_BO, X_BI, self.weight.t())  # [B,I] · [O,I]^T -> [B,O]
        if self.lora_A is not None and self.lora_B is not None:
            Y_BO = Y_BO + fused_adapters(X_BI, self.lora_A, self.lora_B, self.segments)
        return Y_BO

    def extra_repr(self) -> str:
        rows, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={rows}, bias={self.bias is not None}, segments={self.segments}"


def _is_packed(layer: nn.Module) -> bool:
    return isinstance(layer, PackedLinear) or (isinstance(layer, SparseLinear) and (layer.n, layer.m) == (2, 4))

"""Learned feature maps phi, one for each head, whose products imitate exp(q·k / sqrt(D)).

Shape suffixes: B sequences, H heads (query heads for q, KV heads for k), S positions, D head dimension, M columns of W,
F features.
"""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

FEWEST = 16
"""Minimum columns of a Hedgehog by default: with as few features as small heads have dimensions it learns little."""
SMALLEST = 1e-12
"""Features are at least this, so that the weights of far tokens, products of features, are positive."""


class FeatureMap(nn.Module):
    """phi(x), (B, H, S, D) -> (B, H, S, F), from W (H, D, M), in the precision of x."""

    features: int
    """F."""

    def __init__(self, heads: int, head_dim: int, columns: int, generator: Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(_identity(heads, head_dim, columns, generator))


class Hedgehog(FeatureMap):
    """phi(x) = [softmax(xW), softmax(-xW)], the softmax over the M columns; F = 2M."""

    def __init__(self, heads: int, head_dim: int, columns: int, generator: Generator) -> None:
        super().__init__(heads, head_dim, columns, generator)
        self.features = 2 * columns

    def forward(self, x_BHSD: Tensor) -> Tensor:
        """The features of each position."""
        z_BHSM = x_BHSD @ self.weight.to(x_BHSD.dtype)
        return torch.cat([z_BHSM.softmax(-1), (-z_BHSM).softmax(-1)], dim=-1).clamp(min=SMALLEST)


class T2R(FeatureMap):
    """phi(x) = relu(xW + b); F = M."""

    def __init__(self, heads: int, head_dim: int, columns: int, generator: Generator) -> None:
        super().__init__(heads, head_dim, columns, generator)
        self.features = columns
        self.bias = nn.Parameter(torch.zeros(heads, 1, columns))

    def forward(self, x_BHSD: Tensor) -> Tensor:
        """The features of each position."""
        z_BHSM = x_BHSD @ self.weight.to(x_BHSD.dtype) + self.bias.to(x_BHSD.dtype)
        return z_BHSM.relu().clamp(min=SMALLEST)


class UnitLinear(FeatureMap):
    """phi(x) = xW / |xW|, the map of the delta rule; F = M."""

    def __init__(self, heads: int, head_dim: int, columns: int, generator: Generator) -> None:
        super().__init__(heads, head_dim, columns, generator)
        self.features = columns

    def forward(self, x_BHSD: Tensor) -> Tensor:
        """The features of each position."""
        return F.normalize(x_BHSD @ self.weight.to(x_BHSD.dtype), dim=-1)


def make_map(name: str, heads: int, head_dim: int, columns: int | None, generator: Generator) -> FeatureMap:
    """The map `name` of `heads` heads; columns None for F = head_dim, in a Hedgehog even and no fewer than 32."""
    if name == "hedgehog":
        return Hedgehog(heads, head_dim, columns or max(FEWEST, (head_dim + 1) // 2), generator)
    if name == "t2r":
        return T2R(heads, head_dim, columns or head_dim, generator)
    if name == "unit":
        return UnitLinear(heads, head_dim, columns or head_dim, generator)
    raise ValueError(f"no feature map {name!r}")


def _identity(heads: int, head_dim: int, columns: int, generator: Generator) -> Tensor:
    """W of each head (D, M): the identity, then random columns, because equal ones would stay equal."""
    drawn_HDM: Tensor = torch.randn(heads, head_dim, columns, generator=generator) * head_dim**-0.5
    square = min(head_dim, columns)
    drawn_HDM[:, :, :square] = torch.eye(head_dim, square)
    return drawn_HDM

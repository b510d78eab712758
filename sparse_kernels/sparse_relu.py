"""Squared ReLU with a 2:4 result, the activation of an MLP (Haziza et al. 2025, arXiv 2503.16672), in simulation.

    activation   A[B,F]  = relu(H)²
    forward      Y[B,O]  = f(A) · W[O,F]^T + bias        f: of 4 neighbouring features of a token the 2 largest
    weight grad  dW[O,F] = dY[B,O]^T · t(A)              t: of 4 tokens the 2 largest of each feature
    gradient     dH[B,F] = 2 relu(H) ⊙ kept_f ⊙ (dY · W)

f goes by token, so decoding computes what training does. dH is the exact gradient of what was computed: where f drops
an entry there is none, so dH is 2:4 along features, too, for the input gradient of the layer before. Only the weight's
gradient is another one, by t(A): A pruned along the tokens, and not f(A). The tokens of a group are a quarter of the
batch apart, since neighbours are alike; the paper permutes them at random for that. t prunes all features, where the
paper leaves the densest ones out. Everything is computed by dense products with zeros.

Shape suffixes: B tokens, F features of the MLP, O out features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparse_kernels import masks
from sparse_kernels.masked_linear import MaskedLinear, linear
from sparse_kernels.replace import lend_forward
from sparse_kernels.selection import is_conv1d, stored_weight
from sparse_kernels.sparse_linear import SparseLinear

NAME = "sparse_relu2"
"""The activation's name in config.json; transformers knows it once sparse_kernels.transformers is imported."""
DOWN = {"act": "c_proj", "activation_fn": "fc2"}
"""Where GPT-2 and OPT have an activation, and beside it the layer that reads it."""


class SparseSquaredReLU(nn.Module):
    """f(relu(H)²); while `deferred` and in training relu(H)², of which the next layer takes f and t itself."""

    def __init__(self) -> None:
        super().__init__()
        self.deferred = False

    def forward(self, H: Tensor) -> Tensor:
        """(..., F) -> (..., F)."""
        A = torch.relu(H).square()
        return A if self.deferred and self.training else masks.prune_features(A)


class _PrunesInput:
    """The forward pass that `defer_activations` lends to a dense layer."""

    training: bool
    bias: nn.Parameter | None

    def forward(self, A: Tensor) -> Tensor:
        """(..., F) -> (..., O)."""
        if not self.training:
            return super().forward(A)  # type: ignore[misc, no-any-return]
        return linear(masks.prune_features(A), stored_weight(self), self.bias, for_weight=masks.prune_tokens(A))  # type: ignore[arg-type]


def defer_activations(model: nn.Module, *, on: bool) -> None:
    """Let the layer after each SparseSquaredReLU prune it in training, along tokens for its weight's gradient.

    Without it the activation prunes for both, and the gradient is the exact one of what was computed; that is what any
    other training of the model does. An nn.Linear or Conv1D becomes an instance of a subclass of its class meanwhile:
    call this with on=False before layers are swapped for others.
    """
    for activation, down in list(_pairs(model)):
        if activation.deferred == on:
            continue
        activation.deferred = on
        if isinstance(down, SparseLinear | MaskedLinear):
            down.prunes_input = on
        else:
            lend_forward(down, _PrunesInput, on=on)


def _pairs(model: nn.Module) -> Iterator[tuple[SparseSquaredReLU, nn.Module]]:
    """Each activation of GPT-2 or OPT with the layer that reads it, if that is one that trains its weight."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, SparseSquaredReLU) and name in DOWN:
                down = getattr(parent, DOWN[name])
                if isinstance(down, SparseLinear | MaskedLinear | nn.Linear) or is_conv1d(down):
                    yield child, down

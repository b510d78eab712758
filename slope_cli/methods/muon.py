"""Muon's update of a model's hidden matrices: their momentum, orthogonalized.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix, U·S·V^T, by
about U·V^T. Times 0.2·sqrt(max(out, in)) its entries have the root mean square of AdamW's updates, so that AdamW's
learning rate and weight decay serve (Liu et al. 2025, arXiv 2502.16982).

A sparse weight is not the matrix of its values: these are orthogonalized where they sit, in the (out, in) matrix with
its zeros, and read from there again. What falls on pruned entries is lost, so the rest is scaled up to the root mean
square that the whole matrix had. It is no longer orthogonal, so all of this is done twice. A matrix that holds several
side by side, as GPT-2's c_attn those of query, key and value, is orthogonalized in parts.

Shape suffixes: O out features, I in features, K kept entries of a row; P parts of a weight; N matrices of R rows and no
fewer columns C.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slope_cli.models.build import transformer_blocks
from sparse_kernels import MaskedLinear, SparseLinear
from sparse_kernels.reference import gather_kept, kept_columns, scatter_kept

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that is iterated, from the same page: steep at 0, and within 0.7 to 1.2 around 1."""
ITERATIONS = 5
PASSES = 2
"""How often the update of a matrix with pruned entries is orthogonalized and pruned."""
RMS = 0.2
"""The root mean square of an update's entries before the learning rate: that of AdamW's."""
ENTRIES = 1 << 26
"""Of matrices that are orthogonalized together, at most, unless one weight alone has more."""
FUSED = {"c_attn": 3}
"""The parts of layers that compute several products in one, by the last part of their names."""
LINEAR = (nn.Linear, Conv1D, MaskedLinear, SparseLinear)


@dataclass(frozen=True)
class Matrix:
    """A hidden weight, as the dense matrices that are orthogonalized.

    layer: whose `weight`, or `values`, it is. parts: the matrices in it, one under the other.
    """

    layer: Any
    parts: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of a part: (out, in)."""
        layer = self.layer
        if isinstance(layer, Conv1D):
            return layer.nf // self.parts, layer.nx
        return layer.out_features // self.parts, layer.in_features

    @property
    def entries(self) -> int:
        """Of the whole weight, the pruned ones included."""
        return self.parts * self.shape[0] * self.shape[1]

    @property
    def kept(self) -> float:
        """The share of the entries that have a gradient."""
        layer = self.layer
        pruned = isinstance(layer, SparseLinear) or (isinstance(layer, MaskedLinear) and not layer.straight_through)
        return layer.n / layer.m if pruned and not getattr(layer, "unmasked", False) else 1.0

    @property
    def cost(self) -> int:
        """The multiplications of its update."""
        rows, columns = sorted(self.shape)
        passes = PASSES if self.kept < 1 else 1
        return passes * ITERATIONS * self.parts * rows * rows * (2 * columns + rows)

    def dense(self, stored: Tensor) -> Tensor:
        """What lies as the weight is stored, (out, in), (in, out) or (out, in·n/m), as (P, out / P, in)."""
        layer = self.layer
        if isinstance(layer, SparseLinear):
            stored = scatter_kept(stored, _columns(layer), layer.in_features)
        elif isinstance(layer, Conv1D):
            stored = stored.t()
        elif self.kept < 1:  # a momentum may be left from before there was a mask
            stored = torch.where(layer.mask, stored, 0)
        parts: Tensor = stored.unflatten(0, (self.parts, -1))
        return parts

    def stored(self, dense_POI: Tensor) -> Tensor:
        """The inverse of `dense`; what lies on pruned entries is dropped, and the rest has the scale that all had."""
        layer, dense_OI = self.layer, dense_POI.flatten(0, 1)
        if isinstance(layer, Conv1D):
            return dense_OI.t()
        if self.kept == 1:
            return dense_OI
        sparse = isinstance(layer, SparseLinear)
        kept = gather_kept(dense_OI, _columns(layer)) if sparse else torch.where(layer.mask, dense_OI, 0)
        parts: Tensor = kept.unflatten(0, (self.parts, -1))
        norms, all_norms = (torch.linalg.matrix_norm(each, keepdim=True) for each in (parts, dense_POI))
        scaled: Tensor = parts * (math.sqrt(self.kept) * all_norms / norms.clamp(min=1e-12))
        return scaled.flatten(0, 1)


def _columns(layer: SparseLinear) -> Tensor:
    """The columns of the kept entries: on a CPU those that the layer holds anyway; none is kept in a GPU's memory."""
    return kept_columns(layer.row_mask(), layer.n, layer.m) if layer.values.is_cuda else layer.layout()[0]


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, Matrix]:
    """The weights of the linear layers in a model's transformer blocks, which Muon updates.

    Not embeddings and the head, whose rows belong to single tokens; not biases and norms, which are no matrices; not
    low-rank adapters: the product of two factors counts, and one of them starts at zero.
    """
    found: dict[nn.Parameter, Matrix] = {}
    for block in transformer_blocks(model):
        for name, layer in block.named_modules():
            if isinstance(layer, LINEAR):
                weight: Any = layer.values if isinstance(layer, SparseLinear) else layer.weight
                found[weight] = Matrix(layer, FUSED.get(name.rpartition(".")[2], 1))
    return found


def batches(matrices: Mapping[nn.Parameter, Matrix]) -> Iterator[list[nn.Parameter]]:
    """Weights whose parts have the same sides, which are orthogonalized together, up to so many ENTRIES."""

    def sides(weight: nn.Parameter) -> tuple[int, ...]:
        return tuple(sorted(matrices[weight].shape))

    for (rows, columns), alike in groupby(sorted(matrices, key=sides), key=sides):
        batch: list[nn.Parameter] = []
        count = 0
        for weight in alike:
            parts = matrices[weight].parts
            if batch and (count + parts) * rows * columns > ENTRIES:
                yield batch
                batch, count = [], 0
            batch.append(weight)
            count += parts
        yield batch


def updates(matrices: Sequence[Matrix], momenta: Sequence[Tensor]) -> list[Tensor]:
    """The updates of weights of one of `batches`, before the learning rate.

    Args:
        matrices, momenta: of each weight; a momentum has its shape, whole.

    Returns:
        Tensors of the weights' shapes, in the dtype of the momenta.
    """
    found = _orthogonalized(matrices, momenta)
    pruned = [place for place, matrix in enumerate(matrices) if matrix.kept < 1]
    for _ in range(PASSES - 1 if pruned else 0):
        again = _orthogonalized([matrices[place] for place in pruned], [found[place] for place in pruned])
        for place, update in zip(pruned, again, strict=True):
            found[place] = update
    return found


def _orthogonalized(matrices: Sequence[Matrix], stored: Sequence[Tensor]) -> list[Tensor]:
    dense = [matrix.dense(each) for matrix, each in zip(matrices, stored, strict=True)]
    wide = [parts.mT if parts.shape[1] > parts.shape[2] else parts for parts in dense]
    orthogonal_NRC = orthogonal(torch.cat(wide)) * (RMS * math.sqrt(wide[0].shape[2]))
    each = orthogonal_NRC.split([len(parts) for parts in wide])
    back = [new.mT if parts.shape[1] > parts.shape[2] else new for new, parts in zip(each, dense, strict=True)]
    return [matrix.stored(parts) for matrix, parts in zip(matrices, back, strict=True)]


def orthogonal(X_NRC: Tensor) -> Tensor:
    """U·S'·V^T of each matrix U·S·V^T, with S' between about 0.7 and 1.2, by a Newton-Schulz iteration.

    Args:
        X_NRC: (N, R, C), R no more than C; zeros stay zeros.

    Returns:
        The same shape and dtype; bfloat16 is precise enough.
    """
    X: Tensor = X_NRC / torch.linalg.matrix_norm(X_NRC, keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = X @ X.mT  # [N,R,C] · [N,C,R] -> [N,R,R]
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X

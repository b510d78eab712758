"""A linearized model with a range of its layers alone, for models that no device holds whole.

What is not there is replaced by modules without weights, so that names, positions and the model's own forward pass stay
as they are. Hidden states of earlier layers come in where the first block was, and leave where the next one would be.

Shape suffixes: B sequences, T positions, D hidden size, E width of the embedding.
"""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slope_cli.config.methods import LinearizeConfig
from slope_cli.errors import UsageError
from slope_cli.models.build import transformer_blocks


class Passage(NamedTuple):
    """Hidden states of a range of layers, each (B, T, D), in the order of the forward passes.

    entering: those that the next passes begin with, on any device and in any precision; none for layer 0.
    leaving: those that the last passes ended with; the last layers leave none.
    """

    entering: deque[Tensor]
    leaving: list[Tensor]


class Absent(nn.Module):
    """Stands where a block, or a head, is not there, and passes on what it is given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same hidden states."""
        return hidden_states

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: hidden states change hands outside of compiled code."""


class _Entrance(Absent):
    def __init__(self, passage: Passage) -> None:
        super().__init__()
        self._passage = passage

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._passage.entering.popleft().to(hidden_states)


class _Exit(Absent):
    def __init__(self, passage: Passage) -> None:
        super().__init__()
        self._passage = passage

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._passage.leaving.append(hidden_states.detach())
        return hidden_states


class _NoEmbedding(nn.Module):
    """Stands where the embedding of tokens is not there, whose output the entrance replaces."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, ids_BT: Tensor) -> Tensor:
        return torch.zeros((), device=ids_BT.device).expand(*ids_BT.shape, self._width)  # (B, T, E), one number


def ranges_of(layers: int, at_once: int) -> list[range]:
    """The layers from 0 in ranges of `at_once`, the last of which may be shorter."""
    return [range(first, min(first + at_once, layers)) for first in range(0, layers, at_once)]


def learning_ranges(layers: int, config: LinearizeConfig) -> list[range]:
    """The ranges of config.layers_at_once up to the last one that has layers to linearize.

    Raises:
        UsageError: one before it has none.
    """
    ranges = ranges_of(layers, config.layers_at_once)
    learning = [any(layer not in config.kept for layer in each) for each in ranges]
    found = ranges[: len(learning) - learning[::-1].index(True)]
    if not all(learning[: len(found)]):
        rule = f"layers {name_of(found[learning.index(False)])} all keep softmax attention; choose more at once"
        raise UsageError(f"linearize.layers_at_once={config.layers_at_once}: {rule}")
    return found


def name_of(layers: range) -> str:
    """The first and the last layer, "0-7"."""
    return f"{layers.start}-{layers.stop - 1}"


def keep_layers(model: PreTrainedModel, layers: range, *, head: bool = False) -> Passage:
    """Leave a model a range of its layers, in place; what lies outside of all blocks and is small stays as well.

    The embedding of tokens stays with layer 0.

    Args:
        head: keep the model's head.
    """
    blocks, passage = transformer_blocks(model), Passage(deque(), [])
    assert isinstance(blocks, nn.ModuleList)
    for index in range(len(blocks)):
        if index not in layers:
            blocks[index] = Absent()
    if layers.start:
        blocks[0] = _Entrance(passage)
        model.set_input_embeddings(_NoEmbedding(model.get_input_embeddings().embedding_dim))
    if layers.stop < len(blocks):
        blocks[layers.stop] = _Exit(passage)
    for name, child in list(model.named_children()):
        if child is not model.base_model and not head:
            setattr(model, name, Absent())
    return passage

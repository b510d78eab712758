"""Decoding with linearized attention on a GPU: compiled and from a CUDA graph, the tokens of the eager loop.

Shape suffixes: B sequences, T positions.
"""

from typing import Any

import pytest
import torch

from slope_cli.benchmarks import linearize_decoding
from slope_cli.config.methods import LinearizeConfig
from slope_cli.models.build import model_config

# What Inductor imports when it compiles for the first time.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning", "ignore:TensorFloat32 tensor cores"
)

SHAPE: dict[str, Any] = {"vocab_size": 96, "max_position_embeddings": 256, "num_hidden_layers": 2, "hidden_size": 64}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


def decoded(model: Any, side: str, *, graphed: bool) -> list[list[int]]:
    torch.manual_seed(0)
    decoder = linearize_decoding.Decoder(model, side, 3, 64, graphed=graphed)
    assert decoder.graphed == graphed
    steps = []
    for _ in range(40 - graphed):  # capturing takes the first one
        decoder.run()
        steps.append(decoder._ids_B1.flatten().tolist())
    return steps


@pytest.mark.parametrize("side", linearize_decoding.SIDES)
def test_graphs_and_compiled_steps_decode_the_same_tokens(side: str) -> None:
    chosen = linearize_decoding.Subject("tiny", model_config("llama3-8b", overrides=SHAPE), LinearizeConfig(window=8))
    torch.manual_seed(1)
    model = linearize_decoding.build(chosen, torch.device("cuda")).float()
    expected = decoded(model, side.removesuffix(" compiled"), graphed=False)
    found = decoded(model, side, graphed=True)
    assert found == expected[1:]
    if side.endswith("compiled"):
        assert decoded(model, side, graphed=False) == expected


def test_speed_rows_and_the_peak_of_transfer_grow_as_they_should() -> None:
    chosen = linearize_decoding.Subject("tiny", model_config("llama3-8b", overrides=SHAPE), LinearizeConfig(window=64))
    model = linearize_decoding.build(chosen, torch.device("cuda"))
    rows = list(linearize_decoding.speed_rows(model, 4, 128))
    assert [(row.error, row.graphed, row.note) for row in rows] == [("", True, "")] * 3
    for compiled in (False, True):
        rows = [linearize_decoding.transfer_row(model, length, compiled=compiled) for length in (1024, 4096)]
        peaks = [row.peak_bytes or 0 for row in rows]
        assert 0 < peaks[1] < 4.5 * peaks[0], compiled

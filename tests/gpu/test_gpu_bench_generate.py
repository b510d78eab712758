"""slope bench generate and products on a GPU: every variant runs from CUDA graphs, and memory is accounted for."""

from typing import Any

import pytest
import torch

from slope_cli.benchmarks import generate, products, variants
from slope_cli.benchmarks.records import Plan
from slope_cli.benchmarks.timing import Timing, copy_bandwidth, free
from slope_cli.models.build import model_config

# What Inductor imports when it compiles for the first time; PyTorch calls its semi-structured tensors a prototype.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning", "ignore:TensorFloat32 tensor cores", "ignore:.*prototype"
)

CUDA, QUICK = torch.device("cuda"), Timing(warm_up=1, rounds=2, round_seconds=0.01, most_calls=5)
SHAPE: dict[str, Any] = {"vocab_size": 512, "max_position_embeddings": 256, "num_hidden_layers": 2, "hidden_size": 256}
SHAPES = {
    "opt-125m": {**SHAPE, "num_attention_heads": 4, "ffn_dim": 512, "word_embed_proj_dim": 256},
    "llama3-8b": {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512},
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_variant_runs_from_graphs(name: str) -> None:
    free()
    held = torch.cuda.memory_allocated()
    config = model_config(name, overrides=SHAPES[name], dropout=0.0)
    source = variants.Variants(config, None, CUDA, torch.bfloat16, 128)
    plan = Plan(batches=(1, 3, 64), context=128, prompt=100)
    first, second = (source.make(name).blocks[1].qkv for name in ("sparse", "sparse-r6.25"))  # type: ignore[union-attr]
    assert first.prepare().packed.data_ptr() == second.prepare().packed.data_ptr()
    del first, second
    rows = list(generate.engine_rows([*variants.VARIANTS, *variants.AGAINST], plan, source, QUICK))
    assert [(row.variant, row.error) for row in rows if row.variant not in variants.AGAINST and row.error] == []
    for row in rows:
        assert row.error or (row.ratio and (row.peak_bytes or 0) > (row.weight_bytes or 0) > 0)
    del source
    free()
    assert torch.cuda.memory_allocated() < held + 2**27


def test_products_run_from_graphs_over_matrices_that_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CACHED", 2**22)
    rows = list(products.rows("gpt2-small", Plan(tokens=(1, 33)), CUDA, QUICK))
    assert [row.error for row in rows] == [""] * 8
    assert all(row.ratio for row in rows)
    assert rows[0].bound == pytest.approx(16 / 9)
    assert copy_bandwidth(CUDA) > 1e11

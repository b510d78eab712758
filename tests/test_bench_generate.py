"""slope bench generate and products: variants, bytes and times (here on a CPU), and their files."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import SHAPES, tiny_model
from support.runs import slope

from slope_cli.benchmarks import bench, generate, generate_report, products, render, report, variants
from slope_cli.benchmarks.records import (
    BenchResults,
    GenerateResults,
    GenerateRow,
    GeneratingModel,
    Plan,
    ProductResults,
    ProductRow,
)
from slope_cli.benchmarks.timing import Timing, copy_bandwidth
from slope_cli.benchmarks.variants import USUAL, Variants
from slope_cli.errors import UsageError
from slope_cli.inference.cache import LinearCache, Prompts, SoftmaxCache
from slope_cli.models.build import model_config
from slope_cli.utils.typed_json import from_json
from sparse_kernels import masks
from sparse_kernels.packed_linear import PackedLinear

CPU, QUICK = torch.device("cpu"), Timing(warm_up=1, rounds=2)
OLD_RUN = Path(__file__).parent / "old_runs" / "sparse"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU cannot do")


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "copy_bandwidth", lambda device: 1e9)


def source(name: str, length: int = 64) -> Variants:
    torch.manual_seed(0)
    return Variants(model_config(name, overrides=SHAPES[name], dropout=0.0), None, CPU, torch.bfloat16, length)


# Of 16 bits, two blocks of width 32 with 4 heads and 2 KV heads of 8, MLP 48, vocabulary 96, 64 positions.
BLOCK = 64 * 32 + 32 * 32 + 2 * 48 * 32 + 32 * 48
REST = 2 * (2 * 64 + 32 + 96 * 32)  # norms and the head
TABLES = 2 * (96 * 32 + 2 * 64 * 8)  # embeddings; cosines and sines
# 2:4 values are half of the entries; metadata, a bit for each two, is of sides in whole tiles of 64 x 32.
SPARSE_BLOCK = BLOCK + (64 * 32 + 64 * 32 + 128 * 32 + 64 * 64) // 8
# Rank 2 for each of q, k, v; o; gate, up; down.
ADAPTERS = 2 * 2 * ((3 * 32 + 64) + (32 + 32) + (2 * 32 + 96) + (48 + 32))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", 2 * 2 * BLOCK + REST),
        ("sparse", 2 * SPARSE_BLOCK + REST),
        ("sparse-r6.25", 2 * SPARSE_BLOCK + REST + 2 * ADAPTERS),
    ],
)
def test_bytes_that_a_step_reads(name: str, expected: int) -> None:
    decoder = source("llama3-8b").make(name)
    assert generate.read_bytes(decoder) == expected
    assert generate.weight_bytes(decoder) == expected + TABLES
    plan = Plan(batches=(3,), context=64, prompt=32)
    *_, row = generate.engine_rows([name], plan, source("llama3-8b"), QUICK)
    assert row.read_bytes == expected + 2 * 2 * (3 * 2 * 64 * 8) * 2  # keys and values of two layers
    assert row.bound_ms == pytest.approx(row.read_bytes / 1e6)  # at 1 GB/s
    assert row.tokens_per_s == pytest.approx(3e3 / (row.step_ms or 0))


def test_a_tied_head_and_a_sliding_window_are_read_once_and_in_part() -> None:
    dense = source("gpt2-nano").dense
    assert generate.weight_bytes(dense) - generate.read_bytes(dense) == dense.positions.nbytes
    assert variants.sharing(dense).head.keywords["weight"] is dense.tokens  # type: ignore[union-attr]
    config = model_config("mistral-7b", overrides={**SHAPES["mistral-7b"], "sliding_window": 16})
    windowed = Variants(config, None, CPU, torch.bfloat16, 64)
    *_, row = generate.engine_rows(["dense"], Plan(batches=(1,), context=64, prompt=8), windowed, QUICK)
    assert row.read_bytes == generate.read_bytes(windowed.dense) + 2 * 2 * (2 * 16 * 8) * 2


def test_variants_share_what_they_do_not_change() -> None:
    made = source("llama3-8b")
    decoders = {name: made.make(name) for name in variants.VARIANTS}

    def part(name: str, block: int = 0) -> Any:
        return decoders[name].blocks[block].qkv  # type: ignore[union-attr]

    for name, decoder in decoders.items():
        assert decoder.tokens is made.dense.tokens
        softmax = not variants.VARIANTS[name].linear
        assert all(isinstance(cache, SoftmaxCache if softmax else LinearCache) for cache in decoder.caches(1, 8))
    assert part("linearized").weight is made.dense.blocks[0].qkv.weight  # type: ignore[union-attr]
    assert made.dense.blocks[0].linear is None
    for name in ("sparse", "sparse-r1.56", "sparse-r6.25", "sparse-linearized"):
        assert isinstance(part(name), PackedLinear)
        assert part(name).values is part("sparse").values
        assert part(name).values is not part(name, 1).values
    assert part("sparse-r6.25").segments == ((32, 2), (16, 2), (16, 2))
    assert part("sparse-r1.56").lora_A.shape == (3, 32)  # of rank 1 at least
    assert part("sparse").lora_A is None
    dense_OI = made.dense.blocks[0].qkv.weight  # type: ignore[union-attr]
    torch.testing.assert_close(part("sparse").dense(), dense_OI * masks.nm_mask(dense_OI.abs(), 2, 4))


@pytest.mark.slow
def test_each_kind_of_attention_remembers_what_it_needs_of_a_text() -> None:
    shape = {**SHAPES["llama3-8b"], "num_hidden_layers": 4, "max_position_embeddings": 256}
    torch.manual_seed(0)
    made = Variants(model_config("llama3-8b", overrides=shape, dropout=0.0), None, CPU, torch.bfloat16, 256)
    pair = 2 * 2 * 8 * 2  # key and value of 2 KV heads of 8, in 16 bits
    state = 2 * 32 * (8 + 1) * 4 + 8  # of 32 features in float32, and the number of tokens
    additive = 63 * (pair + 1) + state  # with a mark of each token that it is no padding

    def cached(entries: int) -> int:
        return 126 * (pair + 1) + state + entries * (pair + 2 * 8)  # up to two blocks; entries have positions

    ring = 4 * 8  # the place of the oldest key, in each layer
    expected = {
        "dense": 3 * 4 * 200 * pair,
        "linearized": 3 * 4 * additive + ring,
        "linearized-gated": 3 * 4 * additive + ring,
        "linearized-delta": 3 * 4 * (63 * (pair + 1) + 2 * 8 * 8 * 4 + 8) + ring,
        "linearized-cache-64": 3 * 4 * cached(64) + ring,
        "linearized-cache-256": 3 * 4 * cached(256) + ring,
        "linearized-quarter-softmax": 3 * (3 * additive + 200 * pair) + ring * 3 // 4,
    }
    plan = Plan(batches=(3,), context=200, prompt=8)
    rows = [row for row in generate.engine_rows(list(expected), plan, made, QUICK) if row.part == "decode"]
    assert {row.variant: row.remembered_bytes for row in rows} == expected
    assert all(row.tokens_per_s for row in rows)


def test_int8_is_close_to_dense() -> None:
    made = source("gpt2-nano")
    ids_1T, prompts = torch.arange(9)[None], Prompts.of(0, [9], torch.device("cpu"))
    logits = [made.make(name).prefill(made.dense.caches(1, 9), prompts, ids_1T) for name in ("dense", "int8")]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.1, atol=0.05)
    weights = [generate.weight_bytes(made.make(name)) for name in ("dense", "int8")]
    assert weights[1] < 0.7 * weights[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-nano", "opt-125m", "mistral-7b"])
def test_all_variants_are_timed_and_a_failing_one_costs_only_itself(name: str) -> None:
    plan = Plan(batches=(1, 3), context=40, prompt=50)
    rows = list(generate.engine_rows([*USUAL, "semi_structured"], plan, source(name), QUICK))
    json.dumps([asdict(row) for row in rows])
    assert rows[0].variant == "semi_structured"
    assert "CUDA" in rows[0].error
    assert [(row.part, row.batch, row.tokens, row.variant) for row in rows[1:]] == [
        (*place, variant) for place in (("prefill", 1, 50), ("decode", 1, 40), ("decode", 3, 40)) for variant in USUAL
    ]
    for row in rows[1:]:
        assert row.error == ""
        assert row.dense_ms is not None
        assert row.ratio == pytest.approx(row.dense_ms / (row.step_ms or 0))
        assert row.peak_bytes is None
        assert (row.tokens_per_s is None) == (row.bound_ms is None) == (row.part == "prefill")


def test_a_variant_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = source("gpt2-nano")
    broken = made.make("sparse")
    del broken.blocks[1].down.values  # type: ignore[union-attr]
    monkeypatch.setattr(made, "make", lambda name: broken if name == "sparse" else made.dense)
    rows = list(generate.engine_rows(["dense", "sparse"], Plan(batches=(1, 2), context=9, prompt=5), made, QUICK))
    found = [(row.part, row.variant, bool(row.error)) for row in rows]
    dense = [(part, "dense", False) for part in ("prefill", "decode", "decode")]
    assert found == [("prefill", "sparse", True), *dense]


def test_texts_keep_their_length_while_steps_are_timed() -> None:
    decoder = source("llama3-8b").make("dense")
    slots = generate.Slots(decoder, 3, 20)
    generate.fill(slots, list(range(19)))
    slots.lengths.fill_(19)
    for _ in range(4):
        slots.step(3, generate.MODE)
        assert slots.lengths.tolist() == [19] * 3
    for cache in slots.caches:
        assert isinstance(cache, SoftmaxCache)
        assert cache.keys[:, :, :19].abs().amin(dim=(1, 3)).gt(0).all()
        torch.testing.assert_close(cache.keys[0, :, :19], cache.keys[2, :, :19], rtol=0, atol=0)


def test_a_trained_folder_is_compared_with_a_dense_model_of_its_shape() -> None:
    plan = Plan(batches=(2,), context=32, prompt=16)
    entry = generate.model_entry(str(OLD_RUN), plan)
    assert entry.model == "sparse"
    assert entry.blocks == entry.all_blocks
    rows = list(generate.rows(str(OLD_RUN), plan, CPU, QUICK))
    assert [(row.variant, row.error) for row in rows] == [("dense", ""), ("trained", "")] * 2
    assert (rows[3].weight_bytes or 0) < (rows[2].weight_bytes or 0)


@pytest.mark.slow
def test_transformers_generate_is_timed_by_token() -> None:
    plan = Plan(batches=(1, 2), context=40, prompt=16, variants=("dense",), against=("transformers",), depth=1)
    rows = [row for row in generate.rows("gpt2-nano", plan, CPU, QUICK) if row.variant == "transformers"]
    assert [(row.batch, row.error, row.alternated) for row in rows] == [(1, "", False), (2, "", False)]
    assert all(row.ratio and row.dense_ms and row.step_ms for row in rows)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    tiny_model("gpt2-nano").save_pretrained(tmp_path)
    for name, plan, text in (
        ("gpt5", Plan(), "^gpt5: neither the shape of a model nor a folder; "),
        ("bert-base", Plan(), "^bert-base: predicts masked tokens"),
        ("gpt2-nano", Plan(context=257), "^--context 257: must be from 2 to the 256 positions of gpt2-nano$"),
        ("opt-125m", Plan(depth=13), "^--depth 13: opt-125m cannot be cut to that: it has 12 blocks$"),
        (str(tmp_path), Plan(depth=1), "it is trained; measure it whole$"),
        ("opt-125m", Plan(variants=("spares",)), "^--variants spares: is unknown; .*sparse"),
        ("opt-125m", Plan(variants=("trained",)), "^--variants trained: is unknown; "),
        ("opt-125m", Plan(against=("vllm",)), "^--against vllm: is unknown; "),
    ):
        with pytest.raises(UsageError, match=text):
            bench.run("generate", [name], tmp_path, plan=replace(plan, device="cpu"))
    with pytest.raises(UsageError, match=r"^step: has no options but "):
        bench.run("step", plan=Plan(depth=1))
    for words in (("--batches", "1,x"), ("--batches", ""), ("--tokens", "0.5"), ("--device", "tpu")):
        done = slope("bench", "generate", "gpt2-nano", *words)
        assert (done.code, len(done.err.splitlines())) == (2, 1)


@no_gpu
def test_without_a_gpu_the_option_is_named() -> None:
    for kind in ("generate", "products"):
        with pytest.raises(UsageError, match=f"^no GPU here: {kind} cannot be measured; --device cpu "):
            bench.run(kind, ["gpt2-nano"])


@pytest.mark.slow
def test_the_command_measures_on_a_cpu(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--out", tmp_path, "--json", "--batches", "2,1", "--context", "16", "--prompt", "8")
    done = slope("bench", "generate", "gpt2-nano", "--depth", "1", "--variants", "sparse", *words)
    assert done.code == 0, done.err
    (model,) = json.loads(done.out)["generate"]["models"]
    assert (model["model"], model["blocks"], model["all_blocks"], model["not_run"]) == ("gpt2-nano", 1, 4, "")
    found = [(row["part"], row["batch"], row["variant"]) for row in model["rows"]]
    assert found == [
        (*place, name) for place in (("prefill", 1), ("decode", 1), ("decode", 2)) for name in ("dense", "sparse")
    ]
    assert {file.name for file in tmp_path.iterdir()} == {"bench.md", "generate.json", "speed.png", "speed.svg"}
    assert "gpt2-nano, 1 of 4 blocks" in (tmp_path / "bench.md").read_text()
    done = slope("bench", "products", "gpt2-nano", "--tokens", "3", *words)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["products"]["rows"]
    assert [(row["matrix"], row["rows"], row["columns"], row["tokens"], row["error"]) for row in rows] == [
        ("qkv", 384, 128, 3, ""),
        ("out", 128, 128, 3, ""),
        ("up", 512, 128, 3, ""),
        ("down", 128, 512, 3, ""),
    ]


def test_products_of_a_block_are_those_of_the_engine() -> None:
    assert products.matrices("llama3-8b") == {
        "qkv": (6144, 4096, False),
        "out": (4096, 4096, False),
        "up": (28672, 4096, False),
        "down": (4096, 14336, False),
    }
    assert products.matrices("opt-6.7b")["qkv"] == (12288, 4096, True)
    assert products.matrices("gpt2-small")["down"] == (768, 3072, True)


def test_both_sides_of_a_product_are_timed_in_turn() -> None:
    dense, sparse = products.layers(32, 64, True, CPU, torch.float32)
    assert len({weight.data_ptr() for weight, _ in dense}) == len({layer.values.data_ptr() for layer in sparse}) == 2
    X_NI = torch.randn(3, 64)
    weight_OI, bias_O = dense[0]
    expected = torch.nn.functional.linear(X_NI, weight_OI * masks.nm_mask(weight_OI.abs(), 2, 4), bias_O)
    torch.testing.assert_close(sparse[0](X_NI), expected)
    assert all(seconds > 0 for seconds in products.times(dense, sparse, X_NI, QUICK))
    rows = list(products.rows("gpt2-nano", Plan(tokens=(1, 5)), CPU, QUICK))
    assert [row.tokens for row in rows] == [1, 5] * 4
    assert rows[0].bound == pytest.approx(4 * 128 * 384 / (128 * 384 * (2 + 1 / 8)))  # float32 here
    assert all(row.ratio == pytest.approx((row.dense_ms or 0) / (row.sparse_ms or 1)) for row in rows)


def test_the_bandwidth_of_a_copy_counts_reads_and_writes() -> None:
    assert 1e8 < copy_bandwidth(CPU) < 1e13


def measured() -> Iterator[GenerateRow]:
    sizes: dict[str, Any] = {"weight_bytes": 2**30, "peak_bytes": 2**31}
    yield GenerateRow(part="prefill", variant="dense", tokens=99, step_ms=9.0, ratio=1.0, **sizes)
    yield GenerateRow(part="prefill", variant="sparse", tokens=99, step_ms=6.0, ratio=1.5, weight_bytes=2**29)
    for batch in (1, 4):
        sizes = {"tokens": 64, "batch": batch, "bound_ms": 1.0, "dense_ms": 4.0}
        yield GenerateRow(
            part="decode", variant="dense", step_ms=4.0, ratio=1.0, tokens_per_s=250.0, read_bytes=1000, **sizes
        )
        yield GenerateRow(
            part="decode", variant="sparse", step_ms=2.0, ratio=2.0, tokens_per_s=500.0, read_bytes=400, **sizes
        )
    yield GenerateRow(part="decode", variant="int8", tokens=64, batch=4, error="out of memory")


def test_tables_and_pictures_of_generating(tmp_path: Path) -> None:
    model = GeneratingModel(model="opt", blocks=2, all_blocks=9, rows=list(measured()), not_run="stopped after 9 s")
    results = GenerateResults(machine={"gpu": "H", "torch": "2"}, libraries={}, models=[model])
    assert from_json(GenerateResults, json.loads(json.dumps(asdict(results)))) == results
    found = generate_report.tables(results)
    assert all(len(cells) == len(table.columns) for table in found for cells in table.rows)
    assert found[0].rows == [
        ["opt, 2 of 9 blocks", "dense", "250 (1.00)", "250 (1.00)", ""],
        ["opt, 2 of 9 blocks", "sparse", "500 (2.00)", "500 (2.00)", ""],
        ["opt, 2 of 9 blocks", "int8", "–", "–", "out of memory"],
        ["opt, 2 of 9 blocks", "", "", "", "stopped after 9 s"],
    ]
    cells = dict(zip(found[1].columns, found[1].rows[1], strict=True))
    assert (cells["its bound"], cells["of the bound"], cells["speed-up"]) == ("2.500", "50%", "2.000")
    cells = dict(zip(found[2].columns, found[2].rows[1], strict=True))
    assert (cells["of dense"], cells["speed-up"], cells["peak memory"]) == ("0.500", "1.500", "–")
    report.write(BenchResults(generate=results), tmp_path)
    assert "sparse" in (tmp_path / "speed.svg").read_text()
    text = render.PLACES["generate-h200"](asdict(results))
    assert "| opt, 2 of 9 blocks | sparse | 500 (2.00) | 500 (2.00) |" in text


def test_tables_of_products(tmp_path: Path) -> None:
    place: dict[str, Any] = {"model": "opt", "matrix": "up", "rows": 64, "columns": 4096, "bound": 1.78}
    rows = [
        ProductRow(**place, tokens=1, dense_ms=0.03, sparse_ms=0.02, ratio=1.5),
        ProductRow(**place, tokens=2, error="broken"),
    ]
    results = ProductResults(machine={"gpu": "H", "torch": "2"}, libraries={}, rows=rows)
    ratios, times = generate_report.products(results)
    assert ratios.rows == [["opt", "up", "64 × 4,096", "1.78", "1.50", "–", "broken"]]
    assert times.rows == [["opt", "up", "64 × 4,096", "30.0 / 20.0", "–"]]
    report.write(BenchResults(products=results), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"bench.md"}
    assert "| opt | up | 64 × 4,096 | 1.78 | 1.50 |" in render.PLACES["products-h200"](asdict(results))

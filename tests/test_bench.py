"""slope bench: its cases, its measurements (here on a CPU), its estimates, and its files."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.runs import slope

from slope_cli.benchmarks import bench, gemm, measure, records, report
from slope_cli.benchmarks.measure import Variant
from slope_cli.benchmarks.records import (
    AllocatorRow,
    BenchResults,
    Case,
    CaseResult,
    GemmResults,
    GemmRow,
    MemoryResults,
    StepResults,
    StepRow,
)
from slope_cli.benchmarks.timing import Timing
from slope_cli.config import configs
from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.errors import SlopeError, UsageError
from slope_cli.models.build import run_model_config
from slope_cli.models.loss import forward, loss_fn
from slope_cli.utils.typed_json import from_json
from sparse_kernels import sparse_layers

TINY = Case(name="gpt2-nano", seq_len=32, tokens=64, depths=(1, 2))
QUICK = Timing(warm_up=1, rounds=2)
EAGER = tuple(variant for variant in measure.VARIANTS if not variant.compiled)
CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU cannot do")


@pytest.mark.parametrize("case", records.cases().values(), ids=lambda case: case.name)
def test_every_case_is_a_recipe_that_can_be_cut_to_its_depths(case: Case) -> None:
    assert case.name in configs.recipe_names()
    blocks = run_model_config(measure.case_config(case, "dense")).num_hidden_layers
    assert 1 <= len(case.depths) <= 2
    assert sorted(set(case.depths)) == list(case.depths)
    assert case.depths[-1] <= blocks
    assert len(case.depths) == 2 or case.depths[0] == blocks
    config = measure.case_config(case, "slope", case.depths[0])
    assert run_model_config(config).num_hidden_layers == case.depths[0]
    assert config.train.accumulation() == 1
    assert config.train.tokens_per_step == case.tokens


@pytest.mark.slow
def test_steps_of_two_depths_alternate_with_the_fastest_dense_one() -> None:
    rows = list(measure.step(TINY, CPU, EAGER, QUICK))
    assert [(row.depth, row.variant) for row in rows] == [
        (depth, name) for depth in (2, 1) for name in ("dense eager", "sparse eager")
    ]
    for dense, sparse in (rows[:2], rows[2:]):
        assert (dense.error, sparse.error) == ("", "")
        assert (dense.alternated, sparse.alternated) == (False, True)
        assert dense.ratio is None
        assert sparse.dense_ms is not None
        assert sparse.step_ms is not None
        assert sparse.ratio == sparse.dense_ms / sparse.step_ms
        assert sparse.speed_up(1) == records.Speedup(sparse.dense_ms, sparse.step_ms, sparse.ratio)
        assert all(row.further_ms is not None for row in (dense, sparse))
    json.dumps([asdict(row) for row in rows])


def test_timed_steps_update_the_masks_as_a_run_does() -> None:
    runner = measure.Runner(measure.case_config(TINY, "slope", 1), EAGER[1], CPU, QUICK)
    layers = [layer for _, layer in sparse_layers(runner.model)]
    before = [layer.backward_mask_bits._version for layer in layers]
    for _ in range(2):
        runner.step()
    runner.longer()  # one step of several micro-batches
    assert [layer.backward_mask_bits._version - v for layer, v in zip(layers, before, strict=True)] == [3] * len(layers)


def test_work_is_warmed_up_and_timed_in_alternating_rounds() -> None:
    calls: list[str] = []

    def work(name: str) -> None:
        calls.append(name)

    slow, fast = Timing(warm_up=0, rounds=3, round_seconds=1e9, most_calls=2).medians(
        lambda: [work("a"), torch.randn(1 << 20).sort()], lambda: work("b")
    )
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 3]
    assert 0 < fast < slow


def test_a_variant_that_fails_costs_only_itself() -> None:
    variants = (EAGER[0], Variant("broken", "slope", graphed=True), EAGER[1])
    rows = list(measure.depth_rows(TINY, 1, variants, CPU, QUICK))
    assert [bool(row.error) for row in rows] == [False, True, False]
    assert rows[1].step_ms is None
    assert rows[2].alternated
    assert measure.fastest(rows, dense=False) == rows[2]
    assert measure.fastest(rows[1:2], dense=False) is None


def test_a_masked_model_is_measured_on_its_own_objective() -> None:
    words = ["model.overrides={num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2}"]
    config = configs.load("bert-base", [*words, "train.micro_batch=2", "train.tokens_per_step=64", "train.seq_len=32"])
    batch = measure.random_batch(config, 100, "masked", CPU)
    labelled = (batch["labels"] != IGNORED_LABEL).float().mean()
    assert 0 < labelled < 0.5
    loss = loss_fn(forward(measure.build(config, CPU), batch), batch)
    assert loss.sentence_loss is not None
    assert (loss.token_loss + loss.sentence_loss).isfinite()


def live_state(method: str, depth: int | None) -> AllocatorRow:
    row = AllocatorRow(case=TINY.name, method=method, depth=depth or TINY.depths[-1])
    return measure.measure_state(row, measure.case_config(TINY, method, depth), CPU)


@pytest.mark.parametrize("method", ["dense", "slope"])
def test_estimated_state_is_that_of_the_live_tensors(method: str) -> None:
    found = live_state(method, 1)
    assert found.counted is not None
    assert found.estimated is not None
    steps = 4 * 32  # AdamW counts its steps with four bytes for each parameter tensor
    assert 0 <= found.counted - found.estimated <= steps
    assert found.allocated is None


def test_estimated_memory_of_a_whole_model() -> None:
    row = bench.memory_row(TINY)
    assert row.sparse.state == live_state("slope", None).estimated
    assert row.dense.state == 16 * row.parameters
    pruned, rest = row.in_sparse_layers, row.parameters - row.in_sparse_layers
    assert row.sparse.inference == 2 * rest + pruned * 9 / 8
    assert row.sparse.copies == row.dense.copies + pruned / 4  # twice 9/16 of two bytes
    assert row.state_ratio < row.state_ratio_with_adapters < 1


@pytest.mark.slow
def test_opt_13b_is_within_the_memory_aimed_at() -> None:
    row = bench.memory_row(records.cases()["opt-13b"])
    assert row.state_ratio <= 0.60
    assert row.inference_ratio <= 0.58


def step_row(
    depth: int,
    method: str,
    ms: float | None,
    dense_ms: float | None = None,
    error: str = "",
    precision: str = "bf16",
) -> StepRow:
    return StepRow(
        case="opt",
        depth=depth,
        precision=precision,
        variant=f"{method} eager",
        method=method,
        alternated=True,
        error=error,
        step_ms=ms,
        dense_ms=dense_ms,
        ratio=dense_ms / ms if dense_ms and ms else None,
        peak_bytes=2**30,
    )


def entry(*rows: StepRow, depths: tuple[int, ...] = (2, 4)) -> CaseResult:
    case = CaseResult(
        name="opt", seq_len=8, tokens=64, depths=depths, paper=1.2, target=1.3, blocks=10, rows=list(rows)
    )
    case.summary = case.compared(dense=False, precision="bf16")
    return case


FULL = entry(
    step_row(4, "dense", 49), step_row(4, "slope", 40, 50), step_row(2, "dense", 30), step_row(2, "slope", 26, 30)
)


def test_whole_models_are_extrapolated_from_two_depths() -> None:
    assert (found := FULL.summary) is not None
    assert (found.depth, found.dense, found.sparse) == (4, "dense eager", "slope eager")
    assert (found.timed, found.block, found.whole) == (
        records.Speedup(50, 40, 1.25),
        records.Speedup(10, 7, 10 / 7),
        records.Speedup(110, 82, 110 / 82),
    )
    assert report.whole_model(FULL) == "1.341 extrapolated"


def test_a_whole_model_that_was_timed_is_not_extrapolated() -> None:
    whole = entry(step_row(10, "dense", 49), step_row(10, "slope", 40, 50), depths=(10,))
    assert report.whole_model(whole) == "1.250 measured"


def test_without_a_second_depth_or_a_dense_step_nothing_is_extrapolated() -> None:
    failed = step_row(2, "slope", None, error="out of memory")
    part = entry(step_row(4, "dense", 49), step_row(4, "slope", 40, 50), failed)
    assert part.summary is not None
    assert part.summary.timed.ratio == 1.25
    assert report.whole_model(part) == "–"
    assert entry(step_row(4, "slope", 40)).summary is None
    assert entry().summary is None


def test_precisions_are_compared_by_whole_models() -> None:
    """Of 10 blocks, from 4 and 2: in fp8 dense takes 30 ms at 4 and 22 at 2, sparse 25 and 18; dense bf16 50 and 30."""
    fp8 = {"dense": ((4, 30, 50), (2, 22, 30)), "slope": ((4, 25, 50), (2, 18, 30))}
    rows = [
        step_row(depth, method, ms, dense_ms, precision="fp8")
        for method, times in fp8.items()
        for depth, ms, dense_ms in times
    ]
    case = entry(*FULL.rows, *rows)
    case.flops_per_token = 10**9
    step = records.StepResults(machine={"gpu": "NVIDIA H200"}, cases=[case, FULL])
    (row,) = report.precisions(step, 1).rows
    assert report.precisions(step, 8).rows == []  # without the times of further micro-batches
    speed, share = 64 / 0.110, 64 / 0.110 * 1e9 / 989.5e12  # 50 ms and 6 blocks of 10 more
    ratios = [110 / 82, 110 / 54, 110 / 46]
    assert row == ["opt", f"{speed:,.0f}", f"{share:.1%}", *(f"{x:.3f}" for x in ratios), f"{54 / 46:.3f}"]


@no_gpu
def test_products_that_cannot_be_measured_have_a_row_with_the_reason() -> None:
    rows = list(gemm.gemm([64]))
    assert [row.tokens for row in rows] == [gemm.TOKENS, *gemm.MORE_TOKENS, *[gemm.TOKENS] * 4]
    assert [row.product for row in rows if row.product] == ["torch"] * 4
    assert all(row.error for row in rows)
    assert report.break_even(rows) == {}


@pytest.mark.slow
def test_a_failing_process_is_one_line() -> None:
    with pytest.raises(SlopeError, match="ended with exit code 1"):
        list(bench.measured(["step", "no-such-case"], 100))
    with pytest.raises(SlopeError, match="stopped after 0 s"):
        list(bench.measured(["step", "opt-2.7b"], 0.1))


@no_gpu
def test_a_spent_budget_lists_what_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench.Bench(tmp_path, bench.choose(["opt-2.7b", "gpt2-small"]), budget=0)
    found.steps()
    found.gemm()
    cases = json.loads((tmp_path / "step.json").read_text())["cases"]
    assert [case["not_run"] for case in cases] == ["not run: the budget was spent"] * 2
    assert json.loads((tmp_path / "gemm.json").read_text())["not_run"] == "not run: the budget was spent"
    assert "none of 32" in (tmp_path / "bench.md").read_text()
    assert "opt-2.7b: not run: the budget was spent" in capsys.readouterr().err


def test_more_micro_batches_are_added_to_a_step() -> None:
    """Of 10 blocks, from 4 and 2, eight micro-batches a step: dense 50 + 7·40 ms and 30 + 7·24; sparse fp8 half."""
    rows = [
        replace(step_row(depth, "slope", ms / 2, ms, precision="fp8"), further_ms=more / 2, dense_further_ms=more)
        for depth, ms, more in ((4, 50, 40), (2, 30, 24))
    ]
    case = entry(*rows)
    (row,) = report.precisions(records.StepResults(machine={}, cases=[case]), 8).rows
    whole = 330 + 6 * (330 - 198) / 2
    assert row == ["opt", f"{8 * 64 / whole * 1e3:,.0f}", "–", "–", "–", "2.000", "–"]


@no_gpu
@pytest.mark.parametrize("what", ["step", "gemm"])
def test_without_a_gpu_nothing_else_stands_in_for_what_was_asked(what: str) -> None:
    with pytest.raises(UsageError, match=f"^no GPU here: {what} cannot be measured; slope bench memory "):
        bench.run(what)


@no_gpu
def test_without_a_gpu_the_command_estimates_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = slope("bench", "--cases", "gpt2-small,bert-large", "--json")
    assert done.code == 0
    assert done.err.startswith("no GPU here: ")
    assert len(done.err.splitlines()) == 1
    result = json.loads(done.out)
    assert [row["case"] for row in result["memory"]["cases"]] == ["gpt2-small", "bert-large"]
    folder = tmp_path / result["folder"]
    assert re.fullmatch(r"bench-cpu-\d{4}-\d\d-\d\d", folder.name)
    assert sorted(file.name for file in folder.iterdir()) == ["bench.md", "memory.json"]
    alone = slope("bench", "memory", "--cases", "gpt2-small")
    assert (alone.code, alone.err) == (0, "")
    assert "Memory of whole models" in alone.out
    assert f"{folder.name}-2" in alone.out


def test_wrong_words_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="speed: choose one of all, step, gemm, memory"):
        bench.run("speed")
    with pytest.raises(UsageError, match="gpt5-small: no case of this name; did you mean gpt2-small"):
        bench.run("all", ["gpt5-small"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out "):
        bench.run("memory", ["gpt2-small"], tmp_path / "file")


def product(width: int, tokens: int, dense: float, sparse: float, name: str = "forward") -> GemmRow:
    times = {"dense_ms": dense, "sparse_ms": sparse}
    return GemmRow(width=width, tokens=tokens, matrix="up", product=name, algorithm={"config_id": 17}, **times)


HERE = {"machine": {"gpu": "H", "torch": "2"}, "libraries": {"driver": "5"}}
GEMM = GemmResults(
    **HERE,
    not_run="stopped after 9 s",
    rows=[
        product(768, 8192, 1.0, 2.0),
        product(768, 8192, 3.0, 2.0, "input_grad"),
        product(768, 1024, 1.0, 4.0),
        GemmRow(width=768, matrix="up", product="torch", tokens=8192, torch_ms=1.5),
        GemmRow(width=1024, tokens=8192, error="out of memory"),
    ],
)
RESULT = BenchResults(step=StepResults(**HERE, cases=[FULL, entry()]), gemm=GEMM)


def test_break_even_sums_the_products_of_a_block() -> None:
    assert report.break_even(GEMM.rows) == {(768, 8192): 1.0, (768, 1024): 0.25}


def test_every_row_of_every_table_has_its_columns() -> None:
    state = [
        AllocatorRow(case="opt", method="dense", depth=2, estimated=100, counted=100, allocated=101),
        AllocatorRow(case="opt", method="dense", depth=2, error="broken"),
    ]
    memory = MemoryResults(**HERE, cases=[bench.memory_row(TINY)], allocator=state)
    found = report.tables(replace(RESULT, memory=memory))
    assert [table.title for table in found] == [
        "Training steps",
        "Every variant",
        "Break-even of the products",
        "Single products",
        "Memory of whole models",
        "Training state on the GPU",
    ]
    assert all(len(row) == len(table.columns) for table in found for row in table.rows)
    assert all(len(set(table.columns)) == len(table.columns) for table in found)
    (torchs,) = [row[table.columns.index("torch's ms")] for table in found[3:4] for row in table.rows[:1]]
    assert torchs == "1.500"


@pytest.mark.parametrize("part", ["step", "gemm", "memory"])
def test_results_are_read_back_from_their_files(part: str) -> None:
    memory = MemoryResults(**HERE, cases=[bench.memory_row(TINY)])
    results = getattr(replace(RESULT, memory=memory), part)
    assert from_json(type(results), json.loads(json.dumps(asdict(results)))) == results


def test_the_report_is_written_as_markdown_and_pictures(tmp_path: Path) -> None:
    report.write(RESULT, tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert "step, gemm: gpu H, driver 5, torch 2." in text
    assert "1.341 extrapolated" in text
    assert "stopped after 9 s" in text
    assert "to_sparse_semi_structured" in text
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "paper (A100)" in (tmp_path / "speed.svg").read_text()
    assert report.draw(BenchResults(), tmp_path / "none") == []

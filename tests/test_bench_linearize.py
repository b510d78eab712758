"""slope bench linearize: the memory of decoding, the loop that is timed (here on a CPU), and its files.

Shape suffixes: B sequences, T positions.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import SHAPES, linearized, tiny_model, tokens
from support.runs import slope
from transformers.cache_utils import Cache

from slope_cli.benchmarks import bench, linearize_decoding, report
from slope_cli.benchmarks.linearize_decoding import Decoder, FullLayer, Subject, Sweep, subject
from slope_cli.benchmarks.records import BenchResults, DecodeRow, LinearizeResults, ModelResult
from slope_cli.benchmarks.timing import Timing
from slope_cli.checkpoint import base_model, run_folder
from slope_cli.config import configs
from slope_cli.config.methods import LinearizeConfig
from slope_cli.errors import UsageError
from slope_cli.linearize import saved
from slope_cli.linearize.swap import linear_windows
from slope_cli.models.build import model_config
from slope_cli.train.step import require_compiler
from slope_cli.utils.files import write_sealed
from slope_cli.utils.typed_json import from_json
from sparse_kernels import sparsify

CPU = torch.device("cpu")
CAUSAL = ("gpt2-nano", "opt-125m", "llama3-8b")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU cannot do")


QUICK = Timing(warm_up=2, rounds=5)


def tiny(name: str, **settings: Any) -> Subject:
    return Subject(name, model_config(name, overrides=SHAPES[name]), LinearizeConfig(**settings))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_full_cache_gives_the_logits_of_a_growing_one(name: str) -> None:
    model, ids_BT = tiny_model(name), tokens(20)
    with torch.no_grad():
        grown = model(ids_BT[:, :-1], use_cache=True).past_key_values
        # One place is still to be filled: that of the first token, which `update` overwrites.
        sides = [(torch.cat([x[:, :, :1], x], dim=2) for x in (layer.keys, layer.values)) for layer in grown.layers]
        full = Cache(layers=[FullLayer(*pair) for pair in sides])
        at = torch.full((2, 1), 19)
        expected = model(ids_BT[:, -1:], past_key_values=grown, position_ids=at, use_cache=True).logits
        found = model(ids_BT[:, -1:], past_key_values=full, position_ids=at, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"window": 8}, {"window": 8, "keep_softmax": [1]}, {"window": 4, "kind": "terrace"}, {"window": 4, "cache": 8}],
)
@pytest.mark.parametrize("name", CAUSAL)
def test_the_estimated_memory_is_that_of_the_cache(name: str, settings: dict[str, Any]) -> None:
    chosen = tiny(name, **settings)
    estimated = linearize_decoding.memory_row(chosen)
    model = linearize_decoding.build(chosen, CPU).to(torch.bfloat16)
    for length in (40, 90):
        softmax, linear = estimated.remembered(length)
        for side, size in (("softmax", softmax), ("linear", linear)):
            assert Decoder(model, side, 3, length, graphed=False).remembered == pytest.approx(3 * size, abs=64)
    assert estimated.break_even * estimated.softmax_bytes >= estimated.linear_bytes
    assert (estimated.kept_bytes > 0) == ("keep_softmax" in settings)


def test_bytes_of_real_shapes() -> None:
    small, large = (linearize_decoding.memory_row(subject(name)) for name in linearize_decoding.DEFAULT)
    assert (small.softmax_bytes, small.break_even) == (12 * 2 * 768 * 2, 129)
    assert (large.softmax_bytes, large.break_even) == (32 * 2 * 8 * 128 * 2, 193)
    assert large.parameters > 8e9


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_both_modes_are_timed_at_every_length(name: str) -> None:
    model = linearize_decoding.build(tiny(name, window=8), CPU)
    sides = ("softmax", "linear")
    rows = [row for n in (16, 300) for row in linearize_decoding.speed_rows(model, 2, n, sides=sides, timing=QUICK)]
    assert [row.error for row in rows] == [""] * 4
    assert all(row.step_ms and row.tokens_per_s == pytest.approx(2e3 / row.step_ms) for row in rows)
    remembered = [row.remembered_bytes or 0 for row in rows]
    assert 0 < remembered[0] < remembered[2]
    assert 0 < remembered[1] == remembered[3]
    row = linearize_decoding.transfer_row(model, 64, compiled=False, timing=QUICK)
    assert (row.error, row.peak_bytes) == ("", None)
    maps = [parameter for window in linear_windows(model).values() for parameter in window.parameters()]
    assert not any(parameter.requires_grad for parameter in maps)
    assert all(parameter.grad is None for parameter in maps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
@pytest.mark.filterwarnings("ignore:The .grad")
def test_a_step_of_transfer_is_compiled_where_users_have_it_compiled() -> None:
    """As torch's own operators here: for each length its own code, as a run has, whose sequences are all of one."""
    model = linearize_decoding.build(tiny("llama3-8b", window=8), CPU)
    counted = []
    require_compiler("cpu")  # whose own small graph is compiled once in a process
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        for length, compiled in ((64, False), (64, True), (96, True)):
            torch._dynamo.utils.counters.clear()
            row = linearize_decoding.transfer_row(model, length, compiled=compiled, timing=QUICK)
            assert (row.error, row.compiled) == ("", compiled)
            counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counted[0] == 0
    assert counted[1] == counted[2] > 2


def test_a_side_that_fails_costs_only_itself() -> None:
    model = linearize_decoding.build(tiny("gpt2-nano", window=8), CPU)
    window = next(iter(linear_windows(model).values()))
    window.map_q.weight.data = torch.zeros(1, 1, 1)
    rows = list(linearize_decoding.speed_rows(model, 1, 16, sides=("linear", "softmax"), timing=QUICK))
    assert rows[0].error.startswith("RuntimeError: ")
    assert (rows[1].error, rows[1].step_ms is None) == ("", False)


@pytest.mark.parametrize(("most", "limit"), [(1000, 937), (5, 3), (1, 1), (1, 0), (10, 0), (16000, 15999), (7, 7)])
def test_the_largest_batch_is_found(most: int, limit: int) -> None:
    tried = []

    def runs(batch: int) -> str:
        tried.append(batch)
        return "" if batch <= limit else f"no room for {batch}"

    found, reason = linearize_decoding.largest_batch(runs, most)
    assert limit * (1 - linearize_decoding.CLOSE) - 1 < found <= limit
    assert reason == ("" if found == most else reason)
    assert len(tried) < 20
    assert 0 not in tried


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
def test_all_rows_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(lengths=(16, 300), batches=(1,), largest_lengths=(300,), transfer_lengths=(64, 128))
    estimated = linearize_decoding.memory_row(subject("gpt2-nano"))
    room = 4 * 300 * estimated.softmax_bytes  # of four sequences as softmax attention remembers them
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (room, room))
    rows = list(linearize_decoding.rows("gpt2-nano", CPU, sweep, QUICK))
    json.dumps([asdict(row) for row in rows])
    assert [row.error for row in rows] == [""] * len(rows)
    assert {row.model for row in rows} == {"gpt2-nano"}
    parts = [(row.part, row.side) for row in rows]
    three = [("both", side) for side in linearize_decoding.SIDES]
    own = [("own", side) for side in linearize_decoding.SIDES[1:]]
    largest = [("largest", "softmax"), ("largest", "linear")]
    speed = [("speed", side) for _ in range(2) for side in linearize_decoding.SIDES]
    assert parts == [*largest, *three, *own, *speed, ("transfer", ""), ("transfer", "")]
    assert [row.compiled for row in rows[-2:]] == [False] * 2  # without a GPU
    assert [row.batch for row in rows[:3]] == [4, rows[1].batch, 4]
    assert rows[1].batch == pytest.approx(room / estimated.linear_bytes, rel=linearize_decoding.CLOSE, abs=1)


def test_runs_and_folders_bring_their_shape_and_settings(tmp_path: Path) -> None:
    model, settings = linearized("llama3-8b", window=8), LinearizeConfig(window=8)
    folder = tmp_path / "exported"
    tiny_model("llama3-8b").save_pretrained(folder)
    plain = subject(str(folder))
    assert (plain.name, plain.settings, plain.config.num_hidden_layers) == ("exported", LinearizeConfig(), 2)
    saved.write(folder / saved.FOLDER, model, settings, seed=0)
    assert subject(str(folder)).settings == settings
    run = tmp_path / "run"
    run.mkdir()
    words = ["model.name=llama3-8b", "linearize.window=8"]
    (run / run_folder.CONFIG).write_text(configs.dump(configs.load("linearize", words)))
    write_sealed(run / base_model.BASE, base_model.describe(tiny_model("llama3-8b")))
    found = subject(str(run))
    assert (found.settings.window, found.config.hidden_size) == (8, 32)
    assert found.config.max_position_embeddings == linearize_decoding.LONGEST


def test_what_is_timed_without_is_said(tmp_path: Path) -> None:
    model = tiny_model("llama3-8b")
    dense = base_model.describe(model)
    sparsify(model)
    sparse = base_model.describe(model)
    start = "timed as a dense model, without its"
    for place, (description, transfer, note) in enumerate(
        (
            (dense, 1, ""),
            (dense, 0.5, f"{start} adapters"),
            (sparse, 1, f"{start} sparse layers"),
            (sparse, 0.5, f"{start} sparse layers and adapters"),
        )
    ):
        run = tmp_path / str(place)
        run.mkdir()
        words = ["model.name=llama3-8b", "linearize.window=8", f"linearize.transfer={transfer}"]
        (run / run_folder.CONFIG).write_text(configs.dump(configs.load("linearize", words)))
        write_sealed(run / base_model.BASE, description)
        memory = linearize_decoding.memory_row(subject(str(run)))
        assert memory.note == note
        found = report.tables(decoding(replace(entry(), memory=memory)))
        assert [table.rows[0][-1].startswith(note) for table in found[:3]] == [True] * 3
        assert (f"{note}; linear: RuntimeError" in found[0].rows[0][-1]) == bool(note)


def test_an_adapter_in_a_folder_is_noted(tmp_path: Path) -> None:
    tiny_model("llama3-8b").save_pretrained(tmp_path)
    assert subject(str(tmp_path)).note == ""
    (tmp_path / "adapter").mkdir()
    assert "without its adapters" in subject(str(tmp_path)).note


@pytest.mark.slow
@no_gpu
def test_names_of_models_may_stand_with_commas(tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    tiny_model("gpt2-nano").save_pretrained(folder)
    words = ("llama-small,gpt2-nano", folder, "--cases", "gpt2-small,", "--out", tmp_path / "out", "--json")
    done = slope("bench", "linearize", *words)
    assert done.code == 0, done.err
    entries = json.loads(done.out)["linearize"]["models"]
    assert [entry["memory"]["model"] for entry in entries] == ["llama-small", "gpt2-nano", "a,b", "gpt2-small"]


def test_what_cannot_decode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^gpt5: neither a run nor a model folder; shapes are llama-small, gpt2-nano, "
    ):
        bench.run("linearize", ["gpt5"])
    with pytest.raises(UsageError, match=r"^bert-base: predicts masked tokens and cannot decode"):
        subject("bert-base")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    with pytest.raises(UsageError, match=r"^model type 'gpt_neox' is not supported; it must be one of gpt2, "):
        subject(str(tmp_path))


@no_gpu
def test_without_a_gpu_the_command_estimates_the_memory(tmp_path: Path) -> None:
    done = slope("bench", "linearize", "llama-small", "gpt2-small", "--out", tmp_path, "--json")
    assert (done.code, len(done.err.splitlines())) == (0, 1)
    assert done.err.startswith("no GPU here: decoding cannot be timed")
    entries = json.loads(done.out)["linearize"]["models"]
    assert [entry["memory"]["model"] for entry in entries] == ["llama-small", "gpt2-small"]
    assert [entry["not_run"] for entry in entries] == ["not run: no GPU"] * 2
    assert {file.name for file in tmp_path.iterdir()} == {"bench.md", "linearize.json", "speed.png", "speed.svg"}
    text = (tmp_path / "bench.md").read_text()
    assert "not run: no GPU" in text
    assert "129 tokens" in text


def row(part: str, side: str, length: int, **found: Any) -> DecodeRow:
    return DecodeRow(model="tiny", part=part, side=side, length=length, **found)


def entry() -> ModelResult:
    speed: dict[str, Any] = {"batch": 100, "remembered_bytes": 2**20, "graphed": True, "step_ms": 1.0}
    rows = [
        row("largest", "softmax", 4096, batch=100, limit="out of memory"),
        row("largest", "linear", 4096, batch=1000, limit="RuntimeError: too many"),
        row("both", "softmax", 4096, tokens_per_s=1e3, **speed),
        row("both", "linear", 4096, tokens_per_s=2e3, **speed),
        row("both", "linear compiled", 4096, tokens_per_s=3e3, **speed),
        row("own", "linear", 4096, tokens_per_s=5e3, **speed),
        row("speed", "softmax", 512, tokens_per_s=9e2, **speed),
        row("speed", "linear", 512, tokens_per_s=6e2, **speed),
        row("speed", "linear compiled", 512, batch=100, error="broken"),
        row("transfer", "", 1024, peak_bytes=2**30),
        row("transfer", "", 2048, error="out of memory", compiled=True),
    ]
    memory = linearize_decoding.memory_row(tiny("llama3-8b", window=8))
    return ModelResult(memory=memory, rows=rows, not_run="stopped after 9 s")


def decoding(*models: ModelResult) -> BenchResults:
    return BenchResults(linearize=LinearizeResults(machine={"gpu": "H"}, libraries={}, models=list(models)))


def test_the_speed_of_linear_attention_is_that_of_its_faster_side() -> None:
    found = report.largest_batches([entry()])
    cells = dict(zip(found.columns, found.rows[0], strict=True))
    assert cells == {
        "model": "llama3-8b",
        "tokens": "4,096",
        "largest batch: softmax": "100",
        "largest batch: linear": "1,000",
        "ratio": "10.00",
        "target: ratio": "8",
        "batch": "100",
        "softmax tokens/s": "1,000",
        "linear tokens/s": "2,000",
        "compiled tokens/s": "3,000",
        "speed-up": "3.00",
        "target: speed-up": "2",
        "linear at its largest, tokens/s": "5,000",
        "remarks": "linear: RuntimeError: too many",
    }
    failed = [replace(each, error="broken", tokens_per_s=None) for each in entry().rows]
    cells = dict(zip(found.columns, report.largest_batches([replace(entry(), rows=failed)]).rows[0], strict=True))
    assert {cells[name] for name in (*report.SPEED_COLUMNS, "ratio", "batch")} == {"–"}
    assert report.largest_batches([replace(entry(), rows=[], not_run="")]).rows == []


def test_tables_and_pictures_of_decoding(tmp_path: Path) -> None:
    result = decoding(entry())
    assert from_json(LinearizeResults, json.loads(json.dumps(asdict(result.linearize)))) == result.linearize
    found = report.tables(result)
    assert [table.title for table in found] == [
        "Decoding at the largest batches",
        "Decoding by length",
        "Memory of a sequence",
        "Memory of attention transfer",
    ]
    assert all(len(cells) == len(table.columns) for table in found for cells in table.rows)
    assert found[0].rows[0][-1] == "linear: RuntimeError: too many"
    assert found[0].rows[1][-1] == "stopped after 9 s"
    assert found[1].rows[0][-1] == "linear compiled: broken"
    assert [cells[2] for cells in found[3].rows] == ["eager", "compiled"]  # earlier results do not say it
    report.write(result, tmp_path)
    assert "llama3-8b, linear" in (tmp_path / "speed.svg").read_text()
    assert "linearize: gpu H." in (tmp_path / "bench.md").read_text()

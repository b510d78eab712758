"""Training speed, memory and communication by number of GPUs of a node, layout and method, beside the dry run's.

    python -m slope_cli.benchmarks.scaling --data DIR --work DIR --out FILE --models opt-1.3b,opt-2.7b KEY=VALUE...

train.tokens_per_step is that of one GPU. Each row is one run's training steps, by the trainer itself, with one process
for each GPU: the same micro-batches on each GPU (weak scaling), the median over the steps but for the first ones. Rows
are not alternated: compare what differs by more than 5 %. Those that FILE has of the same setting are not measured
again.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from slope_cli.checkpoint import store
from slope_cli.config import configs
from slope_cli.distributed import checks, launch
from slope_cli.distributed.collectives import Group, join
from slope_cli.distributed.layouts import Choice, Cluster, choices
from slope_cli.methods.accounting import phase_sizes
from slope_cli.report.plots import picture
from slope_cli.report.tables import Document, Table
from slope_cli.train.dry_run import untrained_model
from slope_cli.train.loop import Trainer
from slope_cli.utils.files import write_json
from slope_cli.utils.typed_json import from_json

from .records import OfMethod, Results

WARM_UP = 3
"""Steps that are not timed: they compile, capture graphs, and measure kernels."""
TIMED = 5
LAYOUTS = {
    "ddp": ["distributed.layout=ddp"],
    "fsdp, gather=step": ["distributed.layout=fsdp", "distributed.gather=step"],
    "fsdp, gather=block": ["distributed.layout=fsdp", "distributed.gather=block"],
}
SHARES = {
    "all_reduce": 2,
    "allreduce": 2,
    "all_gather": 1,
    "allgather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "broadcast": 1,
}
"""By a ring, a GPU of n sends this many (n-1)/n-th parts of what is reduced, gathered or exchanged."""


@dataclass(frozen=True, kw_only=True)
class ScalingRow(OfMethod):
    """One run. In bytes, of the GPU with most: `peak` of all its memory, `state` of weights, moments and masks, `sent`
    by its collectives in a step; each with what the dry run says.

    tokens_per_s: of all GPUs together. loss: of the last step.
    """

    model: str
    method: str
    layout: str
    gpus: int
    tokens_per_s: float | None = None
    peak: int | None = None
    peak_said: int | None = None
    state: int | None = None
    state_said: int | None = None
    sent: float | None = None
    sent_said: float | None = None
    loss: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What it measures."""
        return self.model, self.method, self.layout, self.gpus


@dataclass(kw_only=True)
class ScalingResults(Results):
    """What was trained, beyond the model's recipe, and the rows."""

    words: list[str]
    rows: list[ScalingRow] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------ in each process


def rank(row: ScalingRow, words: list[str], run: Path, out: Path) -> None:
    """Train a few steps as one of a run's processes; rank 0 writes the row."""
    began = time.perf_counter()
    ranks = launch.ranks()
    config = configs.load(row.model, words)
    checks.LEAST_MEMORY = 0.0  # the row before this one may still hold some
    device = launch.pick_device(config.train.device, ranks)
    group = join(ranks, device)
    group.first(lambda: run.mkdir(parents=True, exist_ok=True))
    trainer = Trainer(config, run, device, None, group)
    trainer.model.train()
    if not sys.stdin.readline():  # the GPUs are this run's from here on; at an end there is nobody who wants the row
        os._exit(1)
    for _ in range(WARM_UP):
        trainer.train_step()
    already, seconds = len(_collectives()), []
    for _ in range(TIMED):
        started = time.perf_counter()
        output, _ = trainer.train_step()
        seconds.append(time.perf_counter() - started)
    sent = sum(_sent(each, ranks.world) for each in _collectives()[already:]) / TIMED
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    state = sum(_local_bytes(t) for t in store.state_tensors(trainer.model, trainer.optimizer).values())
    found = _largest(group, {"peak": peak, "state": state, "sent": sent})
    if ranks.first:
        if (choice := _choice(row, config)) is not None:
            memory = choice.memory
            found["sent_said"] = choice.traffic.of_step(config.train.accumulation(ranks.world))
            found["peak_said"] = memory.total if config.model.dropout == 0 else None
            found["state_said"] = memory.weights + memory.moments + memory.masks
        speed = config.train.tokens_per_step / statistics.median(seconds)
        found |= {"tokens_per_s": speed, "loss": output.loss, "seconds": time.perf_counter() - began}
        write_json(out, asdict(replace(row, **found)))
    group.barrier()
    sys.stdout.flush()
    os._exit(0)  # nothing is saved, and gloo may abort when it is taken apart


def _choice(row: ScalingRow, config: Any) -> Choice | None:
    """What a dry run says of the row's layout."""
    cluster = Cluster(row.gpus, row.gpus)
    mode = config.train.activation_checkpointing
    every = choices(phase_sizes(untrained_model(config), config), cluster, activation_checkpointing=mode)
    return next((choice for choice in every if str(choice.layout) == row.layout), None)


def _largest(group: Group, own: dict[str, Any]) -> dict[str, Any]:
    every = group.gather(own)
    return {key: max((each[key] for each in every if each[key] is not None), default=None) for key in own}


def _local_bytes(tensor: Tensor) -> int:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()


def _collectives() -> list[dict[str, Any]]:
    """What torch's flight recorder holds of NCCL's collectives; nothing without NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    return [] if dump is None else pickle.loads(dump(True, False, False)).get("entries", [])


def _sent(collective: dict[str, Any], world: int) -> float:
    """Bytes that a GPU sends in one collective, by a ring."""
    name = collective["profiling_name"].lower()
    parts = next((parts for kind, parts in SHARES.items() if kind in name), 0)
    sides = [(collective["input_sizes"], collective["input_dtypes"])]
    sides.append((collective["output_sizes"], collective["output_dtypes"]))
    payload = max(sum(map(_bytes, sizes, types)) for sizes, types in sides)  # the whole, which all ranks share
    return parts * payload * (world - 1) / world


def _bytes(shape: Iterable[int], dtype: str) -> int:
    return math.prod(shape) * {"Float": 4, "Half": 2, "BFloat16": 2, "Byte": 1, "Char": 1, "Int": 4, "Long": 8}.get(
        dtype, 4
    )


# ---------------------------------------------------------------------------------------------------------- all of them


def measure(row: ScalingRow, words: list[str], work: Path, port: int, first_gpu: int = 0) -> "Measuring":
    """Start the processes of a row, on the GPUs from `first_gpu` on; they wait for `go` with the model built."""
    name = f"{row.model}-{row.method}-{row.layout}-{row.gpus}".replace(", ", "-")
    out = work / f"{name}.json"
    keys = [f"method={row.method}", *words, *LAYOUTS[row.layout]]
    command = [sys.executable, "-P", "-m", "slope_cli.benchmarks.scaling", "--row", json.dumps(asdict(row))]
    command += ["--work", str(work / name), "--out", str(out), *keys]
    visible = ",".join(str(first_gpu + index) for index in range(row.gpus))
    shared = {"WORLD_SIZE": row.gpus, "LOCAL_WORLD_SIZE": row.gpus, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"CUDA_VISIBLE_DEVICES": visible, "TORCH_FR_BUFFER_SIZE": 100_000}
    children, logs = [], [work / f"{name}.{index}.log" for index in range(row.gpus)]
    for index, path in enumerate(logs):
        own = {**shared, "RANK": index, "LOCAL_RANK": index}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        with path.open("wb") as log:
            how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
            children.append(subprocess.Popen(command, env=environment, **how))
    return Measuring(row, children, out, logs)


@dataclass(frozen=True)
class Measuring:
    """A row whose processes run."""

    row: ScalingRow
    children: list[subprocess.Popen[bytes]]
    out: Path
    logs: list[Path]

    def go(self) -> None:
        """Let them compute."""
        for child in self.children:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has failed; finish says why
                child.stdin.write(b"\n")
                child.stdin.close()

    def finish(self) -> ScalingRow:
        """Wait for them; the row, or why there is none."""
        codes = [child.wait() for child in self.children]
        if any(codes):
            failed = [rank for rank, code in enumerate(codes) if code]
            rank = min(failed, key=codes.__getitem__)  # one that a signal ended, whose code is negative, before others
            lines = [line for line in self.logs[rank].read_text().splitlines() if "Warning" not in line]
            return replace(self.row, error=": ".join([f"rank {rank} ended with {codes[rank]}", *lines[-1:]]))
        return from_json(ScalingRow, json.loads(self.out.read_text()))


def of_one_gpu(results: ScalingResults, row: ScalingRow) -> float | None:
    """A GPU's speed in a row, in parts of the same method's on one GPU."""
    one = _speeds(results).get((row.model, row.method, "ddp", 1))
    return row.tokens_per_s / row.gpus / one if row.tokens_per_s and one else None


def over_dense(results: ScalingResults, row: ScalingRow) -> float | None:
    """A row's speed, in parts of the dense model's in the same layout."""
    dense = _speeds(results).get((row.model, "dense", row.layout, row.gpus))
    return row.tokens_per_s / dense if row.tokens_per_s and dense else None


def _speeds(results: ScalingResults) -> dict[tuple[str, str, str, int], float | None]:
    return {row.key: row.tokens_per_s for row in results.rows}


def document(results: ScalingResults) -> Document:
    """The table: speed for each GPU, its share of one GPU's, its ratio to dense in the same layout, and bytes."""
    cells = []
    for r in sorted(results.rows, key=lambda row: (_models(results).index(row.model), row.gpus)):
        speed = f"{r.tokens_per_s / r.gpus:,.0f}" if r.tokens_per_s else r.error
        ratios = (ratio and f"{ratio:.3f}" for ratio in (of_one_gpu(results, r), over_dense(results, r)))
        sizes = (_beside(*pair) for pair in ((r.state, r.state_said), (r.peak, r.peak_said), (r.sent, r.sent_said)))
        cells.append([r.model, r.method, r.layout, str(r.gpus), speed, *(ratio or "" for ratio in ratios), *sizes])
    speeds = ("tokens/s a GPU", "of one GPU", "over dense")
    of_bytes = ("weights, moments, masks GB (dry run)", "peak GB (dry run)", "sent GB (dry run)")
    columns = ("model", "method", "layout", "GPUs", *speeds, *of_bytes)
    machine = results.machine
    note = f"{machine['gpu'] or machine['processor']}, torch {machine['torch']}; {' '.join(results.words)}"
    return Document("Scaling over the GPUs of a node", [Table("Weak scaling", columns, cells, note=note)])


def _models(results: ScalingResults) -> list[str]:
    return list(dict.fromkeys(row.model for row in results.rows))


def draw(results: ScalingResults, out: Path) -> None:
    """By model: how much of its speed a GPU keeps among others, and the sparse model's speed over the dense one's."""
    models = _models(results)
    with picture(out, panels=2) as ((left, right), _):
        several = [row for row in results.rows if row.gpus > 1]
        _bars(left, models, [(r, f"{r.method}, {r.layout}, {r.gpus}", of_one_gpu(results, r)) for r in several])
        sparse = [row for row in results.rows if not row.dense]
        _bars(right, models, [(r, f"{r.layout}, {r.gpus}", over_dense(results, r)) for r in sparse])
        left.set(ylabel="speed of a GPU, of one GPU's alone")
        right.set(ylabel="speed over the dense model's")


def _bars(axes: Any, models: list[str], bars: list[tuple[ScalingRow, str, float | None]]) -> None:
    labels = list(dict.fromkeys(label for _, label, height in bars if height))
    width = 0.8 / max(len(labels), 1)
    for place, label in enumerate(labels):
        own = [(models.index(row.model), height) for row, other, height in bars if other == label and height]
        at = [model + (place - (len(labels) - 1) / 2) * width for model, _ in own]
        axes.bar(at, [height for _, height in own], width, label=label)
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set_xticks(range(len(models)), models)
    axes.set_ylim(bottom=0.6)
    axes.grid(axis="y", alpha=0.3)
    if labels:
        axes.legend(fontsize="small", loc="lower right")


def _beside(found: float | None, said: float | None) -> str:
    if not found:
        return ""
    return f"{found / 1e9:.1f} ({said / 1e9:.1f})" if said else f"{found / 1e9:.1f}"


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder of `slope data prepare`; by default the embedded text")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--gpus", default="1,2,4,8", help="how many, comma-separated; one is a run for each method at once"
    )
    parser.add_argument("--models", default="opt-2.7b")
    parser.add_argument("--methods", default="slope,dense")
    parser.add_argument("--layouts", default=";".join(LAYOUTS), help="for more than one GPU, separated by semicolons")
    parser.add_argument(
        "--ahead", action="store_true", help="build the next row's model during a row, where memory holds both"
    )
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)  # what one of its processes is given
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.row:
        rank(from_json(ScalingRow, given.row), given.words, given.work, given.out)
    given.work.mkdir(parents=True, exist_ok=True)
    (tokens,) = [int(word.partition("=")[2]) for word in given.words if word.startswith("train.tokens_per_step=")]
    sizes = [word for word in given.words if not word.startswith("train.tokens_per_step=")]
    data = [f"data.path={given.data}"] if given.data else []
    results = _begun(given)

    def start(number: int, batch: list[ScalingRow]) -> list[Measuring]:
        started = []
        for index, row in enumerate(batch):
            words = [*data, *sizes, f"train.tokens_per_step={row.gpus * tokens}"]
            started.append(measure(row, words, given.work, 21000 + 16 * number + index, first_gpu=index))
        return started

    starts = itertools.starmap(start, enumerate(_batches(given, {row.key for row in results.rows})))
    started = next(starts, None)
    while started:
        for each in started:
            each.go()
        following = next(starts, None) if given.ahead else None
        for each in started:
            row = each.finish()
            results.rows.append(row)
            print(row, flush=True)
        write_json(given.out, asdict(results))
        started = following or next(starts, None)
    draw(results, given.out.with_suffix(".png"))
    document(results).show()


def _begun(given: argparse.Namespace) -> ScalingResults:
    """What the file has of the same setting on the same machine, without the rows that failed; nothing, without one."""
    new = ScalingResults(words=given.words)
    if not given.out.is_file():
        return new
    old = from_json(ScalingResults, json.loads(given.out.read_text()))
    same = all(old.machine[key] == new.machine[key] for key in ("gpu", "torch")) and old.words == new.words
    if not same:
        raise SystemExit(f"{given.out} is of another machine or setting; name another file")
    old.rows = [row for row in old.rows if not row.error]
    return old


def _batches(given: argparse.Namespace, known: Container[tuple[str, str, str, int]]) -> Iterable[list[ScalingRow]]:
    """The unknown rows that run at once: on one GPU each where it is for one, else one after another."""
    for model in given.models.split(","):
        for gpus in map(int, given.gpus.split(",")):
            for layout in given.layouts.split(";") if gpus > 1 else ["ddp"]:
                how: dict[str, Any] = {"model": model, "layout": layout, "gpus": gpus}
                rows = [ScalingRow(method=method, **how) for method in given.methods.split(",")]
                rows = [row for row in rows if row.key not in known]
                together = gpus == 1 and len(rows) <= torch.cuda.device_count()
                yield from [rows] if rows and together else [[row] for row in rows]


if __name__ == "__main__":
    main()

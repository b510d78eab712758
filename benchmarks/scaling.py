"""Training speed and memory by number of GPUs of one node, layout and method.

    python -m slope_cli.benchmarks.scaling --data DIR --work DIR --out FILE [--gpus 1,2,4,8] [--model NAME] KEY=VALUE...

train.tokens_per_step is that of one GPU.

Each row is a run of `slope pretrain` with one process for each GPU: the median over its steps but for the first ones,
with the same micro-batches on each GPU (weak scaling). Rows are not alternated: compare what differs by more than 5 %.
"""

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slope_cli.report import metrics
from slope_cli.report.tables import Document, Table
from slope_cli.utils.files import write_json

from .records import Results

WARM_UP = 4
"""Steps that are not timed: they compile, capture graphs, and measure kernels."""
LAYOUTS = {
    "ddp": ["distributed.layout=ddp"],
    "fsdp, gather=step": ["distributed.layout=fsdp", "distributed.gather=step"],
    "fsdp, gather=block": ["distributed.layout=fsdp", "distributed.gather=block"],
}


@dataclass(frozen=True, kw_only=True)
class ScalingRow:
    """tokens_per_s: of all GPUs together; peak_bytes: of the GPU with most; loss: of the last step."""

    model: str
    method: str
    layout: str
    gpus: int
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    error: str = ""


@dataclass(kw_only=True)
class ScalingResults(Results):
    """What was trained, beyond the model's recipe, and the rows."""

    words: list[str]
    rows: list[ScalingRow] = field(default_factory=list)


def measure(
    model: str, method: str, layout: str, gpus: int, words: list[str], data: Path, work: Path, port: int
) -> ScalingRow:
    """Train for a few steps on some of the GPUs."""
    run = work / f"{model}-{method}-{layout}-{gpus}".replace(", ", "-")
    keys = [f"method={method}", f"data.path={data}", *words, *LAYOUTS[layout]]
    command = [sys.executable, "-P", "-m", "slope_cli", "pretrain", model, *keys, "--out", str(run)]
    shared = {"WORLD_SIZE": gpus, "LOCAL_WORLD_SIZE": gpus, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(gpus):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        with (work / f"{run.name}.{rank}.log").open("wb") as log:
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    codes = [child.wait() for child in children]
    row: dict[str, Any] = {"model": model, "method": method, "layout": layout, "gpus": gpus}
    if any(codes):
        lines = (work / f"{run.name}.0.log").read_text().splitlines()
        return ScalingRow(**row, error=lines[-1] if lines else f"exit codes {codes}")
    records = metrics.read(run)
    steps = [record for record in records if record["kind"] == "train"][WARM_UP:]
    return ScalingRow(
        **row,
        tokens_per_s=statistics.median(record["tokens_per_s"] for record in steps),
        peak_bytes=metrics.peak_memory(records),
        loss=steps[-1]["loss"],
    )


def document(results: ScalingResults) -> Document:
    """The table: speed for each GPU, how much of one GPU's it is, and over the dense model in the same layout."""
    speed = {(r.model, r.method, r.layout, r.gpus): r.tokens_per_s for r in results.rows}
    cells = []
    for r in results.rows:
        one, dense = speed.get((r.model, r.method, "ddp", 1)), speed.get((r.model, "dense", r.layout, r.gpus))
        per_gpu = r.tokens_per_s and r.tokens_per_s / r.gpus
        cells.append(
            [
                r.method,
                r.layout,
                str(r.gpus),
                f"{per_gpu:,.0f}" if per_gpu else r.error,
                f"{per_gpu / one:.3f}" if per_gpu and one else "",
                f"{r.tokens_per_s / dense:.3f}" if r.tokens_per_s and dense else "",
                f"{r.peak_bytes / 1e9:.1f}" if r.peak_bytes else "",
            ]
        )
    columns = ("method", "layout", "GPUs", "tokens/s a GPU", "of one GPU", "over dense", "peak GB")
    note = f"{results.machine['gpu']}, torch {results.machine['torch']}; {' '.join(results.words)}"
    return Document(f"Scaling of {results.rows[0].model}", [Table("Weak scaling", columns, cells, note=note)])


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of `slope data prepare`")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--gpus", default="1,2,4,8", help="how many, comma-separated")
    parser.add_argument("--model", default="opt-2.7b")
    parser.add_argument("--methods", default="slope,dense")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    results, port = ScalingResults(words=given.words), 21000
    sizes = [word for word in given.words if not word.startswith("train.tokens_per_step=")]
    tokens = int(next(word for word in given.words if word.startswith("train.tokens_per_step=")).partition("=")[2])
    for gpus in map(int, given.gpus.split(",")):
        for layout in LAYOUTS if gpus > 1 else ["ddp"]:
            for method in given.methods.split(","):
                words, port = [*sizes, f"train.tokens_per_step={gpus * tokens}"], port + 1
                results.rows.append(measure(given.model, method, layout, gpus, words, given.data, given.work, port))
                print(results.rows[-1], flush=True)
                write_json(given.out, asdict(results))
    document(results).show()


if __name__ == "__main__":
    main()

"""Real runs of `slope pretrain`, compared by their own metrics: tokens/s, peak memory, and losses step by step.

    python -m slope_cli.benchmarks.training OUT RUN RUN...

Writes OUT.json, OUT.png and OUT.svg. Losses are compared with the first run's; speed is the median after the first ten
steps.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from slope_cli.report import metrics
from slope_cli.report.plots import picture
from slope_cli.utils.files import write_json

WARM_UP = 10


def summary(run: Path) -> dict[str, Any]:
    """One run: its environment, speed, memory, backends of products, and losses."""
    records = metrics.read(run)
    train = [record for record in records if record["kind"] == "train"]
    products = [record for record in records if record["kind"] == "products"]
    environment = json.loads((run / "environment.jsonl").read_text().splitlines()[-1])
    environment.pop("host", None)
    environment["command"] = [a for a in environment["command"] if not a.startswith("data.path=")]
    return {
        "run": run.resolve().name,
        "environment": environment,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in train[WARM_UP:]),
        "peak_bytes": metrics.peak_memory(records),
        "products": {key: products[-1][key] for key in ("cusparselt", "dense")} if products else None,
        "losses": [record["loss"] for record in train],
    }


def _draw(runs: list[dict[str, Any]], out: Path) -> None:
    first = runs[0]
    with picture(out, panels=2) as ((losses, differences), _):
        for number, run in enumerate(runs):
            how: dict[str, Any] = {"color": f"C{number}", "linewidth": 1.2}
            losses.plot(range(1, len(run["losses"]) + 1), run["losses"], label=run["run"], **how)
            if number:
                difference = [a - b for a, b in zip(run["losses"], first["losses"], strict=False)]
                name = f"{run['run']} minus {first['run']}"
                differences.plot(range(1, len(difference) + 1), difference, label=name, **how)
        losses.set(xlabel="step", ylabel="loss (nats per token)")
        differences.set(xlabel="step", ylabel="difference of losses")
        differences.set_yscale("symlog", linthresh=0.01)
        for axes in (losses, differences):
            axes.legend(frameon=False)
            axes.grid(alpha=0.3)


def main() -> None:
    """Write the files."""
    out, *folders = map(Path, sys.argv[1:])
    runs = [summary(folder) for folder in folders]
    write_json(out.with_suffix(".json"), {"runs": runs})
    _draw(runs, out)


if __name__ == "__main__":
    main()

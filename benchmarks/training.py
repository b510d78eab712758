"""Compare real runs of `slope pretrain` by their own metrics: tokens a second, peak memory, and losses step by step.

    python -m slope_cli.benchmarks.training OUT RUN RUN...

Writes OUT.json and OUT.png. Losses are compared with the first run's; speed is the median after the first ten steps.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from slope_cli.report import metrics

WARM_UP = 10


def summary(run: Path) -> dict[str, Any]:
    """One run: what it ran on, its speed and memory, which products its layers took, its losses."""
    records = metrics.read(run)
    train = [record for record in records if record["kind"] == "train"]
    products = [record for record in records if record["kind"] == "products"]
    environment = json.loads((run / "environment.jsonl").read_text().splitlines()[-1])
    environment.pop("host", None)
    environment["command"] = [word for word in environment["command"] if not word.startswith("data.path=")]
    return {
        "run": run.resolve().name,
        "environment": environment,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in train[WARM_UP:]),
        "peak_bytes": max((record["peak_memory"] for record in train if "peak_memory" in record), default=None),
        "products": {key: products[-1][key] for key in ("cusparselt", "dense")} if products else None,
        "losses": [record["loss"] for record in train],
    }


def _draw(runs: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, differences) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for number, run in enumerate(runs):
        steps = range(1, len(run["losses"]) + 1)
        label = f"{run['run']}: {run['tokens_per_s']:,.0f} tokens/s, peak {run['peak_bytes'] / 2**30:.1f} GiB"
        losses.plot(steps, run["losses"], color=f"C{number}", label=label, linewidth=1.2)
        if number:
            pairs = zip(run["losses"], runs[0]["losses"], strict=False)
            difference = [a - b for a, b in pairs]
            name = f"{run['run']} minus {runs[0]['run']}"
            differences.plot(range(1, len(difference) + 1), difference, color=f"C{number}", label=name, linewidth=1.2)
    losses.set(ylabel="loss (nats per token)")
    differences.set(xlabel="step", ylabel="difference of losses")
    differences.set_yscale("symlog", linthresh=0.01)
    losses.legend(frameon=False)
    differences.legend(frameon=False, loc="lower right", ncols=2)
    for axes in (losses, differences):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    """Write OUT.json and OUT.png."""
    out, *folders = (Path(word) for word in sys.argv[1:])
    runs = [summary(folder) for folder in folders]
    out.with_suffix(".json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    _draw(runs, out.with_suffix(".png"))


if __name__ == "__main__":
    main()

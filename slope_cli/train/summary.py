"""What a finished run prints."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from slope_cli.config.schema import Config
from slope_cli.data.batches import bigram_loss
from slope_cli.data.dataset import Dataset
from slope_cli.errors import SlopeError
from slope_cli.report import metrics, plots
from slope_cli.report.tables import bytes_text, utilization_text
from slope_cli.report.timing import PARTS, Times, time_shares
from slope_cli.train.validation import validation_line
from slope_cli.utils.environment import program

BIGRAM_LIMIT = 4096
"""Vocabularies up to this size are compared with a bigram model."""


def summarize(run: Path, config: Config, dataset: Dataset, times: Times | None = None) -> dict[str, Any]:
    """Plot a finished run and collect its results; SlopeError if the records of its steps are lost.

    Args:
        config: says whether to plot.
        times: of the present start, what is in no record yet: the last checkpoint follows the log.
    """
    records = metrics.read(run)
    val = [record for record in records if record["kind"] == "val" and {"perplexity", "by_source"} <= record.keys()]
    if not val or not any(record["kind"] in metrics.STEPS for record in records):
        advice = f"the checkpoint is sound, and `slope eval {run}` judges it"
        raise SlopeError(f"{run / metrics.JSONL}: the records of its steps are lost; {advice}")
    if config.log.plot:
        plots.draw_loss([run], run / "loss")
    summary = dict(val[-1])
    if dataset.vocab_size <= BIGRAM_LIMIT:
        summary["bigram_loss"] = bigram_loss(dataset.train, list(dataset.val.values()), dataset.vocab_size)
    references = [record for record in records if record["kind"] in ("teacher", "swapped")]
    summary |= {record["kind"]: record["perplexity"] for record in references}
    summary |= _speed([record for record in records if record["kind"] in metrics.STEPS])
    metrics.require(run, records, ("time",), "seconds", *PARTS)
    rest = [{"kind": "time", **times.record()}] if times else []
    summary |= {"time": shares} if (shares := time_shares([*records, *rest])) else {}
    samples = [record["text"] for record in records if record["kind"] == "sample"]
    return summary | ({"sample": samples[-1]} if samples else {})


def _speed(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The medians, after the first tenth of the steps, of what their records hold of the clock."""
    later = steps[len(steps) // 10 :]
    found = {name: [step[name] for step in later if name in step] for name in metrics.CLOCK}
    return {name: median(values) for name, values in found.items() if values}


def report_lines(summary: dict[str, Any], run: Path) -> list[str]:
    """A summary for the terminal."""
    first = validation_line(f"step {summary['step']}", summary)
    if "teacher" in summary:
        ratio = summary["perplexity"] / summary["teacher"] - 1
        first += f", the model it began with {summary['teacher']:.2f} ({ratio:+.1%})"
    lines = [first]
    if len(summary["by_source"]) > 1:
        lines += [f"  {source}: {loss:.4f}" for source, loss in summary["by_source"].items()]
    if "bigram_loss" in summary:
        lines.append(f"a bigram model of the same text: {summary['bigram_loss']:.4f}")
    if "tokens_per_s" in summary:
        mfu = f", MFU {utilization_text(summary)}, of the dense peak" if "mfu_real" in summary else ""
        lines.append(f"speed of the median step: {summary['tokens_per_s']:,.0f} tokens/s{mfu}")
    if "time" in summary:
        lines.append("time: " + ", ".join(f"{part} {share:.0%}" for part, share in summary["time"].items()))
    if "peak_memory" in summary:
        lines.append(f"peak memory of a GPU, the largest of all: {bytes_text(summary['peak_memory'])}")
    if "sample" in summary:
        lines += ["sample:", *("  " + line for line in summary["sample"].splitlines())]
    if (picture := run / "loss.png").exists():
        lines.append(f"plot: {picture}")
    if "sample" in summary:
        lines.append(f'more text: {program()} generate {shlex.quote(str(run))} "Once upon a time"')
    return lines

"""Losses of one model over the time of another: a projection, of what nobody has trained.

    python -m slope_cli.benchmarks.projection COMPARE.json STEP.json --model opt-2.7b --out FILE

COMPARE.json is of `slope compare`: its variants' losses by tokens. STEP.json is of `slope bench step`: how long a big
model's steps take, dense or sparse, in each variant's precision. The projection takes for granted that the big
model's losses would differ by tokens as the small one's do; only the times are its own. A variant is matched by its
method and train.precision alone, so one with adapters would be taken for faster than it is.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slope_cli.compare.summary import Comparison, Summary
from slope_cli.errors import UsageError
from slope_cli.report.plots import picture
from slope_cli.report.tables import NONE, Document, Table, number
from slope_cli.utils.files import write_json
from slope_cli.utils.typed_json import from_json

from .records import CaseResult, ProjectedRow, Projection, StepResults, is_dense


def project(comparison: Comparison, step: StepResults, model: str) -> Projection:
    """The rows of all variants whose steps were timed.

    Raises:
        UsageError: the model was not timed, or no dense variant in bf16 was trained.
    """
    case = next((case for case in step.cases if case.name == model), None)
    if case is None:
        raise UsageError(f"{model}: was not timed; there are {', '.join(case.name for case in step.cases)}")
    kinds = {run.variant: _kind(run.config) for run in comparison.runs}
    goal = next((each for each in comparison.variants if kinds.get(each.variant) == (True, "bf16")), None)
    if goal is None or goal.loss.mean is None:
        raise UsageError("there is no dense variant in bf16 to compare with")
    rows = []
    for each in comparison.variants:
        kind = kinds.get(each.variant)
        time = 1.0 if kind == (True, "bf16") else _time(case, *kind) if kind else None
        if time is not None and each.loss.mean is not None:
            rows.append(_row(each, time, goal))
    sizes = comparison.variants[0].parameters
    trained = "the trained model" if sizes is None else f"a model of {sizes.all / 1e6:.0f} million parameters"
    return Projection(model=model, trained=trained, gpu=str(step.machine.get("gpu")), rows=rows)


def _kind(config: dict[str, Any]) -> tuple[bool, str]:
    """Whether a run's layers are dense, and the precision of its products."""
    precision = config.get("train", {}).get("precision", "auto")
    return is_dense(config["method"]), "bf16" if precision == "auto" else str(precision)


def _time(case: CaseResult, dense: bool, precision: str) -> float | None:
    """Of a step, in parts of the dense one's in bf16."""
    found = case.whole_times(case.compared(dense=dense, precision=precision))
    return None if found is None else found.sparse_ms / found.dense_ms


def _row(each: Summary, time: float, goal: Summary) -> ProjectedRow:
    """A variant's times in parts of that of the goal's whole run."""
    curve, last = each.curve, goal.curve.tokens[-1]
    times = [time * tokens / last for tokens in curve.tokens]
    assert goal.loss.mean is not None
    until = _first(times, curve.mean, goal.loss.mean)
    return ProjectedRow(each.variant, time, each.loss, each.gap, times, curve.mean, until)


def _first(times: Sequence[float], losses: Sequence[float], goal: float) -> float | None:
    """When a loss is first reached, between two validations on the line through them; None if it is not."""
    at = next((place for place, loss in enumerate(losses) if loss <= goal), None)
    if not at:
        return None if at is None else times[0]
    share = (losses[at - 1] - goal) / (losses[at - 1] - losses[at])
    return times[at - 1] + share * (times[at] - times[at - 1])


def table(found: Projection) -> Table:
    """The losses and times."""
    columns = ["variant", "loss", "gap", "time of the run", "time to dense's last loss"]
    cells = []
    for row in found.rows:
        gap = NONE if row.gap is None or row.gap.mean is None else f"{row.gap.mean:+.4f}"
        until = NONE if row.until is None else f"{row.until:.3f}"
        cells.append([row.variant, number(row.loss.mean, ".4f"), gap, f"{row.time:.3f}", until])
    note = (
        f"A projection: losses of {found.trained} at equal tokens, times of {found.model} on one {found.gpu}, in parts "
        "of the dense run's in bf16."
    )
    return Table("Projection", columns, cells, note=note)


def draw(found: Projection, out: Path) -> None:
    """Loss over time."""
    with picture(out) as ((axes,), _):
        for row in found.rows:
            axes.plot(row.times, row.losses, marker="o", markersize=3, label=row.variant)
        axes.set(title=f"Projection: losses of {found.trained}, times of {found.model}")
        axes.set(xlabel="time, in parts of the dense run's in bf16", ylabel="validation loss")
        axes.grid(alpha=0.3)
        axes.legend()


def main() -> None:
    """Write, show and draw a projection."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("compare", type=Path, help="compare.json of `slope compare`")
    parser.add_argument("step", type=Path, help="step.json of `slope bench step`")
    parser.add_argument("--model", required=True, help="the case of step.json whose times count")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write; the picture lies beside it")
    given = parser.parse_args()
    comparison = from_json(Comparison, json.loads(given.compare.read_text()))
    found = project(comparison, from_json(StepResults, json.loads(given.step.read_text())), given.model)
    write_json(given.out, asdict(found))
    draw(found, given.out.with_suffix(".png"))
    Document("Projection", [table(found)]).show()


if __name__ == "__main__":
    main()

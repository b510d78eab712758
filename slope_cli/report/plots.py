"""Loss curves of one or several runs, or of variants over seeds, as PNG and SVG."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slope_cli.errors import SlopeError, UsageError
from slope_cli.report import metrics

WINDOW = 20
"""Steps over which the line over the training loss is a mean; fewer in the beginning, where it would lag behind."""
OPENING = 50
"""The steep first 1/OPENING of a run does not decide the height of the picture."""

MANY = 10
"""More names than this in a legend hide the curves."""
MOST_ROWS = 24
"""Of a legend, as high as the picture."""

_SMOOTH: dict[str, Any] = {"linewidth": 1.6}
_VAL: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 4}
_JOIN: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2}
_TEACHER: dict[str, Any] = {"linestyle": "-.", "linewidth": 1}


def draw_loss(runs: Sequence[Path], out: Path) -> list[Path]:
    """Draw training and validation loss against tokens; a dotted line marks where adapters joined.

    Runs that linearize have a panel more, of the squared error of attention transfer, and a line for their teacher.

    Args:
        out: the path, with or without ending; OUT.png and OUT.svg are written.

    Raises:
        UsageError: a folder that is no run.
        SlopeError: a run without a finished step, or with a damaged log.
    """
    drawn = [(run, _records(run)) for run in runs]
    marked = {kind for _, records in drawn for kind in ("adapters", "teacher", "transfer") if _of(kind, records)}
    with _picture(out, panels=2 if "transfer" in marked else 1) as ((axes, *more), files):
        heights = [_draw_run(axes, records, f"C{number}") for number, (_, records) in enumerate(drawn)]
        _label(axes, [str(run) for run in runs], marked)
        for panel in more:
            _draw_transfer(panel, [_of("transfer", records) for _, records in drawn])
        _set_height(axes, min(low for low, _ in heights), max(high for _, high in heights))
    return files


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[float]]], out: Path) -> list[Path]:
    """Draw validation loss against tokens: for each name the mean and range over the seeds.

    Args:
        curves: by name, lists of equal length: tokens, mean, low, high.
        out: as for `draw_loss`.
    """
    with _picture(out) as ((axes,), files):
        for number, (name, curve) in enumerate(curves.items()):
            color = f"C{number}"
            # A line on its own colours no further than ten; beyond, its style tells it apart.
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            axes.plot(curve["tokens"], curve["mean"], style, color=color, label=name, marker="o", markersize=3)
            axes.fill_between(curve["tokens"], curve["low"], curve["high"], color=color, alpha=0.2, linewidth=0)
        late = [at >= curve["tokens"][-1] / OPENING for curve in curves.values() for at in curve["tokens"]]
        high = [value for curve in curves.values() for value in curve["high"]]
        lowest = min(value for curve in curves.values() for value in curve["low"])
        _set_height(axes, lowest, max(value for value, is_late in zip(high, late, strict=True) if is_late))
        _describe_axes(axes)
        axes.set(ylabel="validation loss (nats per token)", title="mean over seeds, lowest to highest")
        if len(curves) <= MANY:
            axes.legend(loc="upper right", framealpha=1, edgecolor="none")
        else:  # beside the axes
            columns = -(-len(curves) // MOST_ROWS)
            axes.figure.set_size_inches(8 + 1.8 * columns, 4.5)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", ncols=columns, edgecolor="none")
    return files


@contextlib.contextmanager
def _picture(out: Path, *, panels: int = 1) -> Iterator[tuple[list[Any], list[Path]]]:
    """The axes of each panel to draw on, and the files that are written when that is done."""
    import matplotlib
    from matplotlib.figure import Figure

    name = out.name.removesuffix(".png").removesuffix(".svg")
    files = [out.with_name(f"{name}.{ending}") for ending in ("png", "svg")]
    # Text as text, so that an SVG can be searched and edited; the salt makes it the same file each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "slope"}):
        figure = Figure(figsize=(8 if panels == 1 else 11, 4.5), layout="constrained")
        yield list(figure.subplots(1, panels, squeeze=False)[0]), files
        out.parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def _set_height(axes: Any, low: float, high: float) -> None:
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _records(run: Path) -> list[dict[str, Any]]:
    if not (run / metrics.JSONL).is_file():
        raise UsageError(f"{run}: is not the folder of a run (no {metrics.JSONL})")
    records = metrics.read(run)
    if not any(_of(kind, records) for kind in metrics.STEPS):
        raise SlopeError(f"{run}: has no finished step to draw")
    return records


def _of(kind: str, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _draw_run(axes: Any, records: Sequence[dict[str, Any]], color: str) -> tuple[float, float]:
    """Draw one run; returns the lowest and the highest loss that the picture should show of it."""
    train, val = _of("train", records), _of("val", records)
    first = [*train, *_of("transfer", records)][0]
    per_step = first["tokens"] / first["step"]
    tokens, losses = [r["tokens"] for r in train], [r["loss"] for r in train]
    smooth = _smooth(losses)
    axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth, color=color, **_SMOOTH)
    axes.plot([r["step"] * per_step for r in val], [r["loss"] for r in val], color=color, **_VAL)
    for record in _of("adapters", records):
        axes.axvline(record["step"] * per_step, color=color, **_JOIN)
    teacher = [record["loss"] for record in _of("teacher", records)]
    for loss in teacher:
        axes.axhline(loss, color=color, **_TEACHER)
    shown = teacher + [r["loss"] for r in val]
    opening = len(losses) // OPENING
    return min(losses + shown), max(smooth[opening:] + (shown if teacher else []))


def _draw_transfer(axes: Any, runs: Sequence[Sequence[dict[str, Any]]]) -> None:
    """The squared error of each run's attention transfer, on its own axis and scale."""
    for number, records in enumerate(runs):
        tokens, errors = [r["tokens"] for r in records], [r["mse"] for r in records]
        axes.plot(tokens, errors, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axes.plot(tokens, _smooth(errors), color=f"C{number}", **_SMOOTH)
    _describe_axes(axes)
    axes.set(title="transfer", ylabel="mean squared error", yscale="log")


def _label(axes: Any, names: Sequence[str], marked: set[str]) -> None:
    """Axes, title and legend; with several runs, colours tell the runs apart and line styles the curves.

    marked: the kinds of records that have lines of their own.
    """
    _describe_axes(axes)
    if len(names) == 1:
        axes.set_title(Path(names[0]).resolve().name)
    else:
        for number, name in enumerate(names):
            axes.plot([], [], color=f"C{number}", label=name, **_SMOOTH)
    color = "C0" if len(names) == 1 else "0.4"
    axes.plot([], [], color=color, label="training", **_SMOOTH)
    axes.plot([], [], color=color, label="validation", **_VAL)
    if "adapters" in marked:
        axes.plot([], [], color=color, label="adapters join", **_JOIN)
    if "teacher" in marked:
        axes.plot([], [], color=color, label="teacher", **_TEACHER)
    axes.legend(loc="upper right", framealpha=1, edgecolor="none")


def _describe_axes(axes: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.margins(x=0.02)
    axes.grid(alpha=0.3)


def _smooth(losses: Sequence[float]) -> list[float]:
    """Exponential mean over a tenth of the steps so far, at most WINDOW."""
    mean, smooth = 0.0, []
    for number, loss in enumerate(losses, 1):
        mean += (loss - mean) / min(WINDOW, max(1.0, number / 10))
        smooth.append(mean)
    return smooth

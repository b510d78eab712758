"""Loss curves of one or several runs, or of variants over seeds, as PNG and SVG."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slope_cli.errors import UsageError
from slope_cli.report import metrics
from slope_cli.report.terminal import one_row
from slope_cli.utils.files import file_sha256

WINDOW = 20
"""Steps over which the training loss is smoothed; fewer at the beginning, where the curve would lag behind."""
OPENING = 50
"""The steep first 1/OPENING of a training curve does not affect the upper limit of the loss axis."""
DIVERGED = 2
"""A loss so many times the first one is cut off, and the picture says so; every other validation is seen."""
MOST_ROWS = 24
"""The rows of a legend that is as high as the picture."""

NAMED = 3
"""The runs whose names are in that of a picture."""
NAME_BYTES = 60
"""Of the name of each of several runs there: a file's name has 255 bytes at most."""
SHOWN = 2000
"""The points of a curve that a picture has room for."""

_UNDATED: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_SMOOTH: dict[str, Any] = {"linewidth": 1.6}
_VAL: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 4}
_JOIN: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2}
_TEACHER: dict[str, Any] = {"linestyle": "-.", "linewidth": 1}


def default_path(runs: Sequence[Path]) -> Path:
    """Where the picture of runs belongs: RUN/loss of one; of several loss-NAME-NAME here, by the runs' names."""
    if len(runs) == 1:
        return runs[0] / "loss"
    names = [os.fsencode(run.resolve().name)[:NAME_BYTES].decode(errors="ignore") for run in runs]
    more = [f"{len(names) - NAMED}-more"] if len(names) > NAMED else []
    return Path("-".join(["loss", *names[:NAMED], *more]))


def draw_loss(folders: Sequence[Path], out: Path | None = None, *, from_zero: bool = False) -> list[Path]:
    """Draw training and validation loss against tokens; a dotted line marks where adapters were added.

    A run that began with another one's weights begins where that one stood. Linearized runs also have a line for their
    teacher, and a second panel with the squared error of attention transfer.
    Runs of several tokenizers are drawn in bits per byte, each by its validation text's bytes per token.

    Args:
        folders: of runs; of several those that hold no finished step are left out, each with a line on standard error.
        out: the path, by default `default_path`; OUT.png and OUT.svg are written, but of OUT.pdf only that.
        from_zero: every run begins at zero tokens.

    Raises:
        UsageError: a folder does not exist, none has a finished step, or runs of several tokenizers do not all record
            bits per byte.
        SlopeError: a damaged log.
    """
    runs, logs = _with_steps(folders)
    out = out or default_path(runs)
    transfers = [_of("transfer", records) for records in logs]
    unit, scales = _common_unit(runs, logs)
    with picture(out, panels=2 if any(transfers) else 1) as ((axes, *more), files):
        starts = [0 if from_zero else _tokens_before(records) for records in logs]
        drawn = zip(logs, scales, starts, strict=True)
        heights = [_draw_run(axes, records, f"C{number}", *how) for number, (records, *how) in enumerate(drawn)]
        styles = {"training": _SMOOTH, "validation": _VAL}
        styles |= {"adapters join": _JOIN} if any(_first_adapter_step(records) for records in logs) else {}
        styles |= {"teacher": _TEACHER} if any(_of("teacher", records) for records in logs) else {}
        _label(axes, [str(run) for run in runs], styles)
        axes.set(ylabel=f"loss ({unit})", xlabel="tokens, with those of the run before" if any(starts) else "tokens")
        for panel in more:
            _draw_transfer(panel, transfers)
        _set_height(axes, heights)
    return files


def draw_curves(
    curves: Mapping[str, Mapping[str, Sequence[float]]], out: Path, *, over: str = "tokens", label: str | None = None
) -> list[Path]:
    """Draw validation loss, by default against tokens: the mean and the range over the seeds for each name.

    Args:
        curves: by name, lists of equal length: tokens, and mean, low and high in nats per token.
        out: as for `draw_loss`.
        over, label: the list that is drawn against in place of tokens, and what its axis says.
    """
    from matplotlib.ticker import ScalarFormatter

    with picture(out) as ((axes,), files):
        for number, (name, curve) in enumerate(curves.items()):
            color = f"C{number}"
            # There are ten colours; after these the line style distinguishes the curves.
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            axes.plot(curve[over], curve["mean"], style, color=color, label=one_row(name), marker="o", markersize=3)
            axes.fill_between(curve[over], curve["low"], curve["high"], color=color, alpha=0.2, linewidth=0)
        _set_height(axes, [Height(min(c["low"]), max(c["high"]), DIVERGED * c["high"][0]) for c in curves.values()])
        _describe_axes(axes)
        if label is not None:
            axes.set_xlabel(label)
            axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(ylabel="validation loss (nats per token)", title="mean and range over seeds")
        _legend_beside(axes)
    return files


@contextlib.contextmanager
def picture(out: Path, *, panels: int = 1) -> Iterator[tuple[list[Any], list[Path]]]:
    """The axes of each panel, and the files, which are written at the end."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    name = out.name.removesuffix(".png").removesuffix(".svg").removesuffix(".pdf")
    endings = ("pdf",) if out.suffix == ".pdf" else ("png", "svg")
    files = [out.with_name(f"{name}.{ending}") for ending in endings]
    # Text stays text, so that an SVG can be searched and edited; the salt makes the file reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "slope"}):
        figure = Figure(figsize=(8 if panels == 1 else 5.5 * panels, 4.5), dpi=150)
        yield list(figure.subplots(1, panels, squeeze=False)[0]), files
        out.parent.mkdir(parents=True, exist_ok=True)
        ConstrainedLayoutEngine().execute(figure)  # once: as the figure's own layout it would be computed for each file
        for file in files:
            figure.savefig(file, dpi=150, metadata=_UNDATED[file.suffix])


class Height(NamedTuple):
    """The lowest and the highest loss of a run that should be seen, and the one from which it has diverged."""

    low: float
    high: float
    diverged: float


def _set_height(axes: Any, heights: Sequence[Height]) -> None:
    """Let every run be seen up to where it diverged, and say how far one goes on that did."""
    low, high = min(each.low for each in heights), max(min(each.high, each.diverged) for each in heights)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    if (cut := max(each.high for each in heights)) > high + margin:
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top", "fontsize": "small"}
        axes.text(0.99, 0.98, f"cut off: a divergence, up to {cut:.4g}", **place)


def _with_steps(folders: Sequence[Path]) -> tuple[list[Path], list[list[dict[str, Any]]]]:
    """The folders that hold finished steps, and their records; the others are named, UsageError if they are all."""
    runs, logs, reasons = [], [], []
    for folder in folders:
        if not folder.exists():
            raise UsageError(f"{folder}: does not exist")
        is_log = (folder / metrics.JSONL).is_file()
        records = metrics.read(folder) if is_log else []
        if any(_of(kind, records) for kind in metrics.STEPS):
            metrics.require(folder, records, metrics.STEPS, "tokens")
            runs.append(folder)
            logs.append(records)
        else:
            why = "has no finished step to draw" if is_log else f"is not the folder of a run (no {metrics.JSONL})"
            reasons.append(f"{folder}: {why}")
    if not runs:
        raise UsageError("; ".join(reasons))
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    return runs, logs


def _of(kind: str, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _first_adapter_step(records: Sequence[dict[str, Any]]) -> int | None:
    """The step, counted from 1, at which adapters were added; None if no record says so.

    Logs of slope 0.1 have records of the kinds "layers" and "adapters" instead of "phase".
    """
    for record in records:
        if record["kind"] == "adapters" or (record["kind"] in ("phase", "layers") and record["adapters"]):
            return int(record["step"])
    return None


def _common_unit(runs: Sequence[Path], logs: Sequence[Sequence[dict[str, Any]]]) -> tuple[str, list[float]]:
    """The unit in which the losses of runs can be compared, and by what to multiply each run's nats per token."""
    if len({_tokenizer(run) for run in runs}) == 1:
        return "nats per token", [1.0] * len(runs)
    scales = []
    for run, records in zip(runs, logs, strict=True):
        known = [record for record in _of("val", records) if "bits_per_byte" in record]
        if not known:
            reason = "records no bits per byte, and the runs have different tokenizers; draw it alone"
            raise UsageError(f"{run}: {reason}")
        scales.append(known[-1]["bits_per_byte"] / known[-1]["loss"])
    return "bits per byte", scales


def _tokenizer(run: Path) -> str:
    """The hash of a run's tokenizer; empty without one."""
    path = run / "tokenizer" / "tokenizer.json"
    return file_sha256(path) if path.is_file() else ""


def _tokens_before(records: Sequence[dict[str, Any]]) -> int:
    """The tokens that the weights of a run had been trained on before its first step, by its own log."""
    return next((record.get("source_tokens") or 0 for record in _of(metrics.INIT, records)), 0)


def _draw_run(axes: Any, records: Sequence[dict[str, Any]], color: str, scale: float, start: float) -> Height:
    """Draw one run's losses times a scale, from a number of tokens on."""
    train, val = _of("train", records), _of("val", records)
    first = [*train, *_of("transfer", records)][0]
    per_step = first["tokens"] / first["step"]
    tokens, losses = [start + r["tokens"] for r in train], [scale * r["loss"] for r in train]
    smooth = _smooth(losses)
    _plot_steps(axes, tokens, losses, smooth, color)
    validated = [scale * r["loss"] for r in val]
    axes.plot(*_thinned([start + r["step"] * per_step for r in val], validated), color=color, **_VAL)
    if step := _first_adapter_step(records):
        axes.axvline(start + (step - 1) * per_step, color=color, **_JOIN)  # between the step before and this one
    teacher = [scale * record["loss"] for record in _of("teacher", records)]
    for loss in teacher:
        axes.axhline(loss, color=color, **_TEACHER)
    shown = teacher + validated
    later = smooth[len(losses) // OPENING :] + shown
    first_losses = [curve[0] for curve in (losses, validated, teacher) if curve]
    return Height(min(losses + shown), max(later), DIVERGED * max(first_losses))


def _plot_steps(
    axes: Any, tokens: Sequence[float], values: Sequence[float], smooth: Sequence[float], color: str
) -> None:
    """Draw a value of each step, pale, and its smooth curve."""
    axes.plot(*_thinned(tokens, values), color=color, alpha=0.25, linewidth=0.8)
    axes.plot(*_thinned(tokens, smooth), color=color, **_SMOOTH)


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The lowest and the highest point of each stretch of a curve, which look as all of its points would."""
    stretch = -(-2 * len(y) // SHOWN)
    if stretch <= 2:
        return list(x), list(y)
    kept = set[int]()
    for first in range(0, len(y), stretch):
        part = range(first, min(first + stretch, len(y)))
        kept |= {min(part, key=y.__getitem__), max(part, key=y.__getitem__)}
    kept |= {0, len(y) - 1}
    return [x[i] for i in sorted(kept)], [y[i] for i in sorted(kept)]


def _draw_transfer(axes: Any, runs: Sequence[Sequence[dict[str, Any]]]) -> None:
    """The squared error of each run's attention transfer, on its own axis and scale."""
    for number, records in enumerate(runs):
        tokens, errors = [r["tokens"] for r in records], [r["mse"] for r in records]
        _plot_steps(axes, tokens, errors, _smooth(errors), f"C{number}")
    _describe_axes(axes)
    axes.set(title="transfer", ylabel="mean squared error", yscale="log")


def _label(axes: Any, names: Sequence[str], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Axes, title and legend; with several runs, colours distinguish the runs and line styles the curves."""
    _describe_axes(axes)
    if len(names) == 1:
        axes.set_title(one_row(Path(names[0]).resolve().name), parse_math=False)
    else:
        for number, name in enumerate(names):
            axes.plot([], [], color=f"C{number}", label=one_row(name), **_SMOOTH)
    for label, style in styles.items():
        axes.plot([], [], color="C0" if len(names) == 1 else "0.4", label=label, **style)
    _legend_beside(axes)


def _legend_beside(axes: Any) -> None:
    """A legend beside the axes, which hides no curve; the picture becomes wider."""
    columns = -(-len(axes.get_legend_handles_labels()[1]) // MOST_ROWS)
    width, height = axes.figure.get_size_inches()
    axes.figure.set_size_inches(width + 1.8 * columns, height)
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": "small"}
    # Names may have dollar signs, which would begin a formula.
    for text in axes.legend(**place, ncols=columns, edgecolor="none").get_texts():
        text.set_parse_math(False)


def _describe_axes(axes: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.margins(x=0.02)
    axes.grid(alpha=0.3)


def _smooth(losses: Sequence[float]) -> list[float]:
    """The exponential mean over a tenth of the steps so far, at most WINDOW."""
    mean, smooth = 0.0, []
    for number, loss in enumerate(losses, 1):
        mean += (loss - mean) / min(WINDOW, max(1.0, number / 10))
        smooth.append(mean)
    return smooth

"""The picture of a comparison over time; that over tokens is `plots.draw_curves`."""

from pathlib import Path
from typing import Any

from slope_cli.compare.summary import Comparison
from slope_cli.report.plots import OPENING, picture
from slope_cli.report.terminal import one_row

UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


def draw_over_time(result: Comparison, out: Path) -> list[Path]:
    """Draw each variant's validation loss against the time of its training steps: mean and range over the seeds.

    Args:
        out: the path; OUT.png and OUT.svg are written.

    Returns:
        The files; none if no variant's times are known, as in results of version 0.1.
    """
    curves = {each.variant: each.curve for each in result.variants if each.curve.seconds}
    if not curves:
        return []
    longest = max(curve.seconds[-1] for curve in curves.values())
    divisor, unit = next((size, unit) for size, unit in UNITS if longest >= size or size == 1)
    with picture(out) as ((axes,), files):
        for number, (name, curve) in enumerate(curves.items()):
            times, color = [seconds / divisor for seconds in curve.seconds], f"C{number}"
            # There are ten colours; after these the line style distinguishes the curves.
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            axes.plot(times, curve.mean, style, color=color, label=one_row(name), marker="o", markersize=3)
            axes.fill_between(times, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
        # The steep beginning does not decide the height.
        late = [
            high
            for curve in curves.values()
            for high, seconds in zip(curve.high, curve.seconds, strict=True)
            if seconds >= curve.seconds[-1] / OPENING
        ]
        lowest = min(low for curve in curves.values() for low in curve.low)
        margin = 0.06 * (max(late) - lowest) or 0.1
        axes.set_ylim(lowest - margin, max(late) + margin)
        axes.set(ylabel="validation loss (nats per token)", title="mean and range over seeds")
        axes.set(xlabel=f"{unit} of training steps{' as measured' if result.equal == 'time' else ' as logged'}")
        axes.margins(x=0.02)
        axes.grid(alpha=0.3)
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": "small"}  # hides nothing
        for text in axes.legend(**place, edgecolor="none").get_texts():
            text.set_parse_math(False)  # names may have dollar signs, which would begin a formula
    return files

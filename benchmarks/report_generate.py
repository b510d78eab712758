"""Results of `slope bench generate` as tables and panels of the picture."""

from collections.abc import Sequence
from typing import Any

from slope_cli.benchmarks.tables import Row, Table, gib, number

SPEED_TARGET, BATCH_TARGET = 2.0, 8.0
"""Tokens a second at the largest batch that both hold, and the largest batch, over softmax's, from 4,096 tokens on."""
SHOWN_LENGTHS = (4096, 16384)


def tables(entries: Sequence[Row]) -> list[Table]:
    """The tables of what was reckoned and measured; some may have no rows."""
    return [_largest(entries), _speed(entries), _memory(entries), _transfer(entries)]


def summary(entry: Row, length: int) -> Row:
    """What was found of a model at one length, None for what was not.

    softmax_batch, linear_batch: the largest of each, and batch_ratio; batch: of the comparison, softmax_speed and
    linear_speed there in tokens a second, the faster of linear's two, and ratio; own_speed: linear's at its largest.
    """
    rows = [row for row in entry["rows"] if row.get("length") == length and not row["error"]]
    found: Row = dict.fromkeys(("batch", "batch_ratio", "ratio"))
    for side in ("softmax", "linear"):
        found[f"{side}_batch"] = next((r["batch"] for r in rows if (r["part"], r["side"]) == ("largest", side)), None)
        found[f"{side}_speed"] = _fastest(rows, "both", side)
    found["own_speed"] = _fastest(rows, "own", "linear")
    found["batch"] = next((row["batch"] for row in rows if row["part"] == "both"), None)
    if found["softmax_batch"] and found["linear_batch"] is not None:
        found["batch_ratio"] = found["linear_batch"] / found["softmax_batch"]
    if found["softmax_speed"] and found["linear_speed"]:
        found["ratio"] = found["linear_speed"] / found["softmax_speed"]
    return found


def _fastest(rows: Sequence[Row], part: str, side: str) -> float | None:
    speeds = [row["tokens_per_s"] for row in rows if row["part"] == part and row["side"].startswith(side)]
    return max(speeds, default=None)


def _lengths(entry: Row, *parts: str) -> list[int]:
    return sorted({row["length"] for row in entry["rows"] if row["part"] in parts and "length" in row})


def _largest(entries: Sequence[Row]) -> Table:
    columns = ("model", "tokens", "largest batch: softmax", "linear", "ratio", "target", "at batch")
    columns += ("softmax tokens/s", "linear tokens/s", "speed-up", "target", "linear at its largest, tokens/s", "")
    rows = []
    for entry in entries:
        name = entry["memory"]["model"]
        for length in _lengths(entry, "largest", "both", "own"):
            s = summary(entry, length)
            cells = [name, f"{length:,}", *(number(s[f"{side}_batch"], ",") for side in ("softmax", "linear"))]
            cells += [number(s["batch_ratio"]), f"{BATCH_TARGET:g}" if length >= 4096 else "", number(s["batch"], ",")]
            cells += [number(s[f"{side}_speed"], ",.0f") for side in ("softmax", "linear")]
            cells += [number(s["ratio"]), f"{SPEED_TARGET:g}" if length >= 4096 else ""]
            rows.append([*cells, number(s["own_speed"], ",.0f"), "; ".join(_note(entry) + _remarks(entry, length))])
        if entry["not_run"]:
            rows.append([name, *[""] * (len(columns) - 2), entry["not_run"]])
    note = (
        "Greedy decoding of one model with random weights, dense and 16-bit, in its two modes, in one loop; linear: "
        "the faster of eager and compiled. Softmax: torch's fused attention over a preallocated cache that is full at "
        "this length. Largest batch: the one whose steps still run, to within 3 %, its prompts not counted."
    )
    return Table("Decoding at the largest batches", columns, rows, note)


def _note(entry: Row) -> list[str]:
    """What of the model is not in its numbers; older results do not say it."""
    note = entry["memory"].get("note")
    return [note] if note else []


def _remarks(entry: Row, length: int) -> list[str]:
    """What went otherwise than planned in the rows of the largest batches."""
    rows = [row for row in entry["rows"] if row["part"] in ("largest", "both", "own") and row.get("length") == length]
    found = [(row["side"], row["error"] or row.get("note") or row.get("limit", "")) for row in rows if "side" in row]
    return [f"{side}: {text}" for side, text in found if text not in ("", "out of memory")]


def _speed(entries: Sequence[Row]) -> Table:
    columns = ("model", "batch", "tokens", "softmax tokens/s", "linear tokens/s", "compiled tokens/s", "speed-up")
    columns += ("remembered GiB: softmax", "linear", "")
    rows = []
    for entry in entries:
        points = sorted({(row["batch"], row["length"]) for row in entry["rows"] if row["part"] == "speed"})
        for batch, length in points:
            by_side = {
                row["side"]: row
                for row in entry["rows"]
                if (row["part"], row.get("batch"), row["length"]) == ("speed", batch, length)
            }
            speeds = [by_side.get(side, {}).get("tokens_per_s") for side in ("softmax", "linear", "linear compiled")]
            best = max((speed for speed in speeds[1:] if speed), default=None)
            cells = [
                entry["memory"]["model"],
                f"{batch:,}",
                f"{length:,}",
                *(number(speed, ",.0f") for speed in speeds),
            ]
            cells += [number(best / speeds[0] if best and speeds[0] else None)]
            cells += [gib(by_side.get(side, {}).get("remembered_bytes")) for side in ("softmax", "linear")]
            faults = [
                f"{side}: {row['error'] or row['note']}" for side, row in by_side.items() if row["error"] or row["note"]
            ]
            rows.append([*cells, "; ".join(_note(entry) + faults)])
    return Table("Decoding by length", columns, rows, "As above; from CUDA graphs where nothing else is said.")


def _memory(entries: Sequence[Row]) -> Table:
    columns = ("model", "linear layers", "window", "softmax bytes a token", "linear bytes at any length", "break-even")
    columns += (*(f"softmax / linear at {length:,}" for length in SHOWN_LENGTHS), "")
    rows = []
    for entry in entries:
        m = entry["memory"]
        kind = f"{m['window']}{' terrace' if m['kind'] == 'terrace' else ''}"
        cells = [m["model"], f"{m['linear_layers']} of {m['layers']}", kind, f"{m['softmax_bytes']:,}"]
        cells += [f"{m['linear_bytes']:,}", f"{m['break_even']:,} tokens"]
        cells += [number(remembered(m, n)[0] / remembered(m, n)[1], ".1f") for n in SHOWN_LENGTHS]
        rows.append([*cells, "; ".join(_note(entry))])
    note = (
        "Reckoned from shapes, for one sequence: 16-bit keys and values, of linearized layers those of the window and "
        "a float32 state. Ratios are of all layers, break-even is of the linearized ones."
    )
    return Table("What decoding remembers", columns, rows, note)


def remembered(memory: Row, length: int) -> tuple[int, int]:
    """Bytes of a sequence of this length, all layers: with softmax attention, and linearized."""
    kept = memory["kept_bytes"] * length
    return memory["softmax_bytes"] * length + kept, memory["linear_bytes"] + kept


def _transfer(entries: Sequence[Row]) -> Table:
    columns = ("model", "tokens", "step", "peak GiB", "KiB a token", "")
    rows = []
    for entry in entries:
        for row in (row for row in entry["rows"] if row["part"] == "transfer"):
            peak = row.get("peak_bytes")
            each = number(peak / row["length"] / 2**10 if peak else None, ",.0f")
            step = "compiled" if row.get("compiled") else "eager"  # older results do not say it
            rows.append([row["model"], f"{row['length']:,}", step, gib(peak), each, row["error"]])
    note = (
        "One sequence's step, each layer's backward pass within the forward pass; the allocator's peak above what is "
        "held between steps."
    )
    return Table("Memory of attention transfer", columns, rows, note)


def panels(entries: Sequence[Row]) -> int:
    """How many panels `draw` fills."""
    return (1 if entries else 0) + (1 if any(_lengths(entry, "speed") for entry in entries) else 0)


def draw(axes: Sequence[Any], entries: Sequence[Row]) -> None:
    """Memory over length, and tokens a second over length where they were measured, into as many axes as `panels`."""
    if not entries:
        return
    lengths = [2**power for power in range(5, 15)]
    for place, entry in enumerate(entries):
        m, color = entry["memory"], f"C{place}"
        for index, (style, side) in enumerate((("--", "softmax"), ("-", "linear"))):
            sizes = [remembered(m, length)[index] / 2**20 for length in lengths]
            axes[0].plot(lengths, sizes, style, color=color, label=f"{m['model']}, {side}")
    axes[0].set(title="Remembered of one sequence", xlabel="tokens", ylabel="MiB", xscale="log", yscale="log")
    if len(axes) > 1:
        _draw_speed(axes[1], entries)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()


def _draw_speed(axis: Any, entries: Sequence[Row]) -> None:
    for place, entry in enumerate(entries):
        rows = [row for row in entry["rows"] if row["part"] == "speed" and not row["error"]]
        batch = max((row["batch"] for row in rows), default=0)
        for style, side in (("--", "softmax"), ("-", "linear")):
            chosen = [row for row in rows if row["batch"] == batch]
            points = [
                (n, _fastest([r for r in chosen if r["length"] == n], "speed", side)) for n in _lengths(entry, "speed")
            ]
            known = [(length, speed) for length, speed in points if speed is not None]
            label = f"{entry['memory']['model']}, {side}, batch {batch}"
            axis.plot([x for x, _ in known], [y for _, y in known], style, marker="o", color=f"C{place}", label=label)
    axis.set(title="Decoding", xlabel="tokens before", ylabel="tokens a second", xscale="log", yscale="log")

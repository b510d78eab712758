"""What a table of `slope bench` is."""

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""


def number(value: float | None, form: str = ".2f") -> str:
    """A cell; empty for None."""
    return "" if value is None else format(value, form)


def over_teacher(row: Row) -> str:
    """How far a linearized model's perplexity with its adapters is above its teacher's."""
    return f"{100 * (row['adapted'] / row['teacher'] - 1):+.1f} %"


def gib(count: float | None) -> str:
    """Bytes as GiB; empty for None."""
    return "" if count is None else f"{count / 2**30:.2f}"

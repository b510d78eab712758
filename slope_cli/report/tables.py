"""Tables on a terminal and in Markdown, and numbers as text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from slope_cli.report.terminal import one_row

NONE = "–"
"""The cell of a value that does not exist."""


@dataclass(frozen=True)
class Table:
    """A table whose cells are text.

    left: the columns, besides the first, that hold text and are aligned left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: Sequence[str] = ()


def rows_in_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A header and rows in Markdown."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join("| " + " | ".join(one_row(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def plain_in_markdown(text: str) -> str:
    """A text that Markdown shows as it is, such as the name of a folder."""
    # An underscore between letters is one to Markdown, too.
    return re.sub(r"([\\`*\[\]<>#&!|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_row(text))


class Document(NamedTuple):
    """Tables with lines of text above and below them."""

    title: str
    tables: Sequence[Table]
    above: Sequence[str] = ()
    below: Sequence[str] = ()

    def markdown(self) -> str:
        """The whole document in Markdown."""
        parts = [f"# {self.title}", *self.above]
        for table in self.tables:
            parts += [f"## {table.title}", *filter(None, [table.note]), rows_in_markdown(table.columns, table.rows)]
        return "\n\n".join([*parts, *filter(None, ["\n".join(f"* {line}" for line in self.below)])]) + "\n"

    def show(self) -> None:
        """Print it to standard output: on a terminal the drawn tables and the lines below, elsewhere Markdown."""
        from rich.console import Console
        from rich.table import Table as Drawn

        console = Console()
        if not console.is_terminal:
            print(self.markdown(), end="")
            return
        for table in self.tables:
            drawn = Drawn(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
            for number, column in enumerate(table.columns):
                drawn.add_column(column, justify="left" if number == 0 or column in table.left else "right")
            for row in table.rows:
                drawn.add_row(*map(one_row, row))
            console.print(drawn, markup=False)
        for line in self.below:
            console.print(one_row(line), markup=False, highlight=False)


def number(value: float | None, form: str = ".2f") -> str:
    """A number in a cell."""
    return NONE if value is None else format(value, form)


def counted(count: int, noun: str, ending: str = "s") -> str:
    """A number with its noun, which has the ending unless the number is 1."""
    return f"{count:,} {noun}{ending if count != 1 else ''}"


def bytes_text(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def utilization_text(utilization: Mapping[str, float]) -> str:
    """Model FLOPs utilization of both kinds, each by its name; see `accounting.Flops.utilization`."""
    return f"{utilization['mfu_dense_equivalent']:.1%} dense-equivalent, {utilization['mfu_real']:.1%} real"

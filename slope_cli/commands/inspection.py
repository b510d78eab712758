"""Commands that look: at recipes, keys, runs, and this machine."""

from pathlib import Path
from typing import Annotated

import typer

from slope_cli.commands.options import AsJson, keys_with, print_result, recipes_with
from slope_cli.config import configs
from slope_cli.errors import SlopeError, UsageError
from slope_cli.report.terminal import named_lines

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this recipe.", autocompletion=recipes_with)
    ] = None,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="With --copy: the new file.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Write recipe NAME to FILE, to start one of your own.")] = False,
) -> None:
    """List the recipes, print one, or copy one.

    To copy: slope recipes --copy NAME FILE.
    """
    if copy != (file is not None):
        raise UsageError("to copy a recipe: slope recipes --copy NAME FILE, such as --copy gpt2-small mine.yaml")
    if name is None:
        heads = {each: configs.recipe_text(each).splitlines()[0].lstrip("# ") for each in configs.recipe_names()}
        print("\n".join(named_lines(heads)))
        return
    text = configs.recipe_text(name)
    if file is None:
        print(text, end="")
    elif file.exists():
        raise UsageError(f"{file}: already exists; choose another file")
    else:
        file.write_text(text, encoding="utf-8")


def config(
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY",
            help="Keys, such as optim.lr, sections, or patterns, such as '*.lr'.",
            autocompletion=keys_with,
        ),
    ] = None,
) -> None:
    """List all sections of keys, or explain some keys.

    Each with its type, default, meaning, choices or unit, and an example.
    """
    from slope_cli.config.reference import explain

    print("\n".join(explain(keys or [])))


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="Path of the plot, NAME.pdf for a PDF; default: RUN/loss, or loss-RUN-RUN.")
    ] = None,
    from_zero: Annotated[bool, typer.Option("--from-zero", help="Draw each branch from zero tokens on, too.")] = False,
) -> None:
    """Plot the loss of runs as PNG and SVG, or as PDF.

    A run that began with another one's weights begins where that one stood. Runs of several tokenizers are drawn in
    bits per byte. A folder without a finished step is left out.
    """
    from slope_cli.report.plots import draw_loss

    for file in draw_loss(runs, out, from_zero=from_zero):
        print(file)


def check(run: Run, as_json: AsJson = False) -> None:
    """Verify every byte of a run.

    Its config, log and checkpoints, and the sparse layers of the newest one.
    """
    from slope_cli.checkpoint.verify import check as verify

    result = verify(run)
    print_result(result, result["lines"], as_json)
    if result["faults"]:
        raise SlopeError(f"{run}: {len(result['faults'])} fault(s), the first in {result['faults'][0]}")


def doctor(as_json: AsJson = False) -> None:
    """Say what is missing on this machine, and how to fix it."""
    from slope_cli.doctor import examine

    result, lines = examine()
    print_result(result, lines, as_json)
    if not result["training"]:
        raise SlopeError("training cannot work here; see above")

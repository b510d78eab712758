"""The command line: what the commands are called, and how they end.

Results go to standard output, the log to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage or config,
75 stopped by a signal, with a checkpoint or finished parts saved: the same command resumes.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import slope_cli
from slope_cli.commands import data, inference, inspection, measuring, training
from slope_cli.config.command import KeyCommand
from slope_cli.distributed import peers
from slope_cli.distributed.signals import STOPPED
from slope_cli.errors import SlopeError, one_line
from slope_cli.report.terminal import MOST_COLUMNS, escaped_streams, flushed_output

COMMANDS: dict[str, Callable[..., None]] = {  # in the order of --help, after `slope data`
    "recipes": inspection.recipes,
    "config": inspection.config,
    "pretrain": training.pretrain,
    "linearize": training.linearize,
    "finetune": training.finetune,
    "compare": training.compare,
    "check": inspection.check,
    "plot": inspection.plot,
    "eval": measuring.evaluate,
    "generate": inference.generate,
    "export": inference.export,
    "serve": inference.serve,
    "convert-llama2c": inference.convert_llama2c,
    "bench": measuring.bench,
    "doctor": inspection.doctor,
}
# Without rich markup, Typer's own errors are plain lines, not boxes.
PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
WIDTH = {"max_content_width": MOST_COLUMNS}


class _DataFirst(TyperGroup):
    """Data are prepared before anything else; Typer would list groups of commands last."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "data")


app = typer.Typer(
    cls=_DataFirst, context_settings=WIDTH, pretty_exceptions_enable=False, help=slope_cli.__doc__, **PLAIN
)
data_app = typer.Typer(help="Prepare text for training.", **PLAIN)
data_app.command("prepare", cls=KeyCommand)(data.prepare)
data_app.command("info", cls=KeyCommand)(data.info)
data_app.command("recall", cls=KeyCommand)(data.recall)
app.add_typer(data_app, name="data")
for _name, _command in COMMANDS.items():
    app.command(_name, cls=KeyCommand)(_command)


@app.callback(invoke_without_command=True)
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for every error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if debug:
        os.environ["SLOPE_DEBUG"] = "1"
    if version:
        print(slope_cli.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; known errors become one line and an exit code."""
    os.environ["PYTHONSAFEPATH"] = "1"  # no child process imports from the working folder
    with escaped_streams():
        try:
            with flushed_output():
                app(prog_name="slope")
        except SystemExit as end:
            peers.leave(end.code if isinstance(end.code, int) else 0, "")
            raise
        except Exception as error:
            known = isinstance(error, SlopeError | OSError | MemoryError | RuntimeError)
            reason = one_line(error) if known and "SLOPE_DEBUG" not in os.environ else ""
            code = getattr(error, "exit_code", 1)
            text = (reason if code == STOPPED else f"error: {reason}") if reason else traceback.format_exc().rstrip()
            peers.leave(code, text)
            print(text, file=sys.stderr)
            raise SystemExit(code) from None

"""Commands that take KEY=VALUE, and answer a key that was written as an option."""

from functools import partial
from itertools import takewhile
from typing import Any

from typer.core import TyperArgument, TyperCommand

from slope_cli.config.values import known_keys, near_keys
from slope_cli.errors import UsageError, nearest


class KeyCommand(TyperCommand):
    """A command with plain words in its help; if it takes KEY=VALUE, `--train.steps 10` is answered with that form."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            param.get_help_record = partial(_help_row, param)  # type: ignore[method-assign]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As TyperCommand's; UsageError for an unknown option that is a key, or more like a key than like an option."""
        params = self.get_params(ctx)
        options = {option for param in params for option in param.opts}
        takes_keys = any("KEY=VALUE" in str(param.metavar) for param in params if hasattr(param, "metavar"))
        for at, word in enumerate(takewhile(lambda word: word != "--", args)):
            option, _, value = word.partition("=")
            unknown = takes_keys and option.startswith("--") and option not in options
            if unknown and (key := _key(option, options)):
                following = next(iter(args[at + 1 :]), "--")
                value = value or ("VALUE" if following.startswith("--") else following)
                raise UsageError(f"{option}: is no option; a key is written without dashes: {key}={value}")
        return super().parse_args(ctx, args)


def _key(option: str, options: set[str]) -> str:
    """The key that was meant by an unknown option; "" if it is none, or more like one of the known options."""
    name = option.lstrip("-").replace("-", "_")
    near = [name] if name in known_keys() else near_keys(name)
    exact = bool(near) and near[0].endswith(name)
    return near[0] if near and (exact or not nearest(option, options)) else ""


def _help_row(param: Any, ctx: Any) -> tuple[str, str] | None:
    """The row of an argument or option in the help: Typer 0.29 says KEY=VALUE <list[str]>, and <int range>."""
    if (row := type(param).get_help_record(param, ctx)) is None:
        return None
    name = row[0].partition(" <")[0] if isinstance(param, TyperArgument) else row[0].replace(" range>", ">")
    return name, row[1]

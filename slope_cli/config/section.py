"""What a section of the configuration is made of: keys, each with its choices, unit and example, and their checks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from slope_cli.errors import UsageError

if TYPE_CHECKING:
    from slope_cli.config.schema import Config


MAX_WHOLE = 2**63 - 1
"""The largest whole number: of 64 bits, so that what counts with it stays finite."""


class Facts(NamedTuple):
    """What `slope config KEY` says beside a key's type, default and meaning.

    choices: all values that it may have, or none if there are too many to list; null is not listed. unit: what its
    number counts or is a share of. example: a value in YAML, another one than the default.
    """

    choices: tuple[str, ...] = ()
    unit: str = ""
    example: str = ""


def setting(default: Any, *choices: str, unit: str = "", example: str = "") -> Any:
    """A field of a section; see `Facts`. Without an example it is the first choice that is not the default."""
    example = example or next((choice for choice in choices if choice != default), "")
    metadata = {"facts": Facts(choices, unit, example)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(default: bool | str) -> Any:
    """A field that is true or false, or if `default` is "auto" also that."""
    return setting(default, example="false" if default else "true")


def facts_of(section: Any) -> Mapping[str, Facts]:
    """The facts of each key of a section, by its name within it; of sections within it none."""
    return {each.name: each.metadata["facts"] for each in fields(section) if "facts" in each.metadata}


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a value."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(each)


class Section:
    """A part of the configuration, a dataclass. Its name is given with the class."""

    section = ""

    def __init_subclass__(cls, section: str) -> None:
        cls.section = section

    def __post_init__(self) -> None:
        for name, facts in facts_of(self).items():
            value = getattr(self, name)
            numbers = [*_numbers(value)]
            self._need(all(isinstance(x, int) or math.isfinite(x) for x in numbers), name, "must be finite")
            self._need(all(isinstance(x, float) or abs(x) <= MAX_WHOLE for x in numbers), name, "must be below 2^63")
            if facts.choices and value is not None:
                self._need(value in facts.choices, name, f"choose one of {', '.join(facts.choices)}")
        self._check_values()

    def _check_values(self) -> None:
        """UsageError for a value out of range."""

    def check(self, config: Config) -> None:
        """For a method's own section: UsageError if its values conflict with other sections."""

    def unused(self, config: Config) -> dict[str, str]:
        """Keys of this section that have no effect in this configuration, each with the cause as KEY=VALUE."""
        return {}

    def _all(self, because: str) -> dict[str, str]:
        return dict.fromkeys(vars(self), because)

    def _need(self, ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise UsageError(f"{self.section}.{key}={getattr(self, key)}: {rule}")

    def _positive(self, *keys: str) -> None:
        for key in keys:
            self._need(getattr(self, key) > 0, key, "must be positive")

    def _not_negative(self, *keys: str) -> None:
        for key in keys:
            self._need(getattr(self, key) >= 0, key, "must be 0 or more")

    def _share(self, *keys: str) -> None:
        for key in keys:
            rule = f"is {facts_of(self)[key].unit}, which must lie between 0 and 1"
            self._need(0 <= getattr(self, key) <= 1, key, rule)

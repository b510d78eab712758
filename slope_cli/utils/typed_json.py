"""Dataclasses read back from the JSON that `dataclasses.asdict` and `json.dumps` made of them."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], content: Mapping[str, Any]) -> T:
    """An instance of a dataclass, with the dataclasses inside it.

    Files of other versions stay readable: unknown keys are ignored, and a field without a key takes its default.

    Raises:
        TypeError: a field without a default has no key, or the content is no mapping.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"{kind.__name__}: not a JSON object")
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name in content]  # type: ignore[arg-type]
    return kind(**{name: _value(hints[name], content[name]) for name in names})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(hint, UnionType):
        hint = next((part for part in get_args(hint) if is_dataclass(part) or get_origin(part)), None)
    if value is None or hint is None:
        return value
    if is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (list, tuple):
        return origin(_value(parts[0], each) for each in value)
    if origin is dict:  # JSON keys are strings
        return {int(key) if parts[0] is int else key: _value(parts[1], each) for key, each in value.items()}
    return value

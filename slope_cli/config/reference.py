"""The reference of all keys, for `slope config` and docs/config.md: type, default and meaning, from the schema."""

import ast
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import yaml

from slope_cli.config import schema
from slope_cli.config.configs import container, defaults
from slope_cli.config.schema import AUTO, METHODS, Config, Section, SparsityConfig
from slope_cli.config.values import flat
from slope_cli.errors import UsageError, did_you_mean

TYPES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "bool | str": "true, false or auto",
    "tuple[float, float]": "two numbers",
    "list[str]": "list of texts",
    "list[int]": "list of whole numbers",
    "list[list[int]]": "list of lists of whole numbers",
    "dict[str, Any]": "mapping",
    "dict[str, list[int]]": "mapping",
}
"""The names of types in the reference, by annotation."""


class Key(NamedTuple):
    """A key: its full name, its type as in TYPES, its default as YAML, and its meaning."""

    name: str
    type: str
    default: str
    meaning: str


def sections() -> Mapping[str, tuple[str, list[Key]]]:
    """The docstring and the keys of each section, in order; "" stands for keys outside of sections."""
    module = ast.parse(inspect.getsource(schema))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    documented: dict[str, tuple[str, list[Key]]] = {"": ("", list(_keys(classes["Config"], "")))}
    for field in fields(Config):
        section = getattr(Config(), field.name)
        if isinstance(section, Section):
            node = classes[type(section).__name__]
            documented[field.name] = ast.get_docstring(node) or "", list(_keys(node, f"{field.name}."))
    return documented


def _keys(node: ast.ClassDef, prefix: str) -> Iterator[Key]:
    """The annotated fields of a class that are not sections, each with the string below it."""
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        annotation, name = ast.unparse(statement.annotation), f"{prefix}{statement.target.id}"
        if annotation.endswith("Config"):
            continue
        kind = TYPES[annotation.removesuffix(" | None")] + (" or null" if annotation.endswith(" | None") else "")
        documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        meaning = inspect.cleandoc(str(following.value.value)) if documented else ""  # type: ignore[union-attr]
        auto = f"; auto is {AUTO[name]}." if name in AUTO else ""
        yield Key(name, kind, _default(name), " ".join(meaning.split()).removesuffix("." * bool(auto)) + auto)


def _default(name: str) -> str:
    """The default as written; if it depends on the method, the usual resolved one (and the others)."""
    becomes = {method: keys[name] for method, keys in _by_method().items() if name in keys}
    usual = next(iter(becomes.values()), None)
    others = ", ".join(f"{method}: {_text(value)}" for method, value in becomes.items() if value != usual)
    return f"{_text(usual)} ({others})" if others else _text(defaults().get(name, {}))


@functools.cache
def _by_method() -> Mapping[str, dict[str, Any]]:
    """The resolved defaults of each method, without the keys that the method requires."""
    given: dict[str, dict[str, Any]] = {"wanda": {"sparsity": SparsityConfig(start=1.0)}}
    becomes = {method: flat(container(Config(method=method, **given.get(method, {})))) for method in METHODS}
    del becomes["wanda"]["sparsity.start"]
    return {method: {key: value for key, value in keys.items() if key != "method"} for method, keys in becomes.items()}


def _text(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return text.removesuffix("...\n").strip()


def explain(query: str | None) -> list[str]:
    """Lines about a key, all keys of a section, or (None) all sections.

    Raises:
        UsageError: there is no such key or section; the message suggests similar names.
    """
    documented = sections()
    names = [name for name in documented if name]
    methods = [f"  {name:12}{meaning}" for name, meaning in METHODS.items()]
    if query is None:
        lines = [f"  {name:12}{documented[name][0].splitlines()[0]}" for name in names]
        more = "For the keys of a section: slope config SECTION; for one key: slope config SECTION.KEY"
        return ["method", *methods, "", "sections", *lines, "", more]
    if query in names:
        text, keys = documented[query]
        return [text, "", *(line for key in keys for line in _lines(key))]
    everything = {key.name: key for _, keys in documented.values() for key in keys}
    if query in everything:
        return [*_lines(everything[query]), *(methods if query == "method" else [])]
    section, _, name = query.partition(".")
    if same := [key for key in everything if key.endswith(f".{name or section}")]:
        hint = f"did you mean {' or '.join(same)}?"
    elif name and section in names:
        hint = did_you_mean(query, [key.name for key in documented[section][1]])
    else:
        hint = did_you_mean(section, ["method", *names])
    raise UsageError(f"{query}: unknown key; {hint}")


def _lines(key: Key) -> list[str]:
    return [f"{key.name}: {key.type}; default {key.default}", f"    {key.meaning}"]


def markdown() -> str:
    """The text of docs/config.md."""
    lines = ["# Configuration", ""]
    lines += ["Every key with its type, default and meaning. If the default depends on the method, those of other"]
    lines += ["methods are in brackets. A recipe is YAML with these keys; on the command line they are KEY=VALUE."]
    lines += ["`slope config KEY` prints the same, and `slope pretrain RECIPE --dry-run` the values of a run."]
    lines += ["", "This page is generated by `python -m slope_cli.config.reference`."]
    lines += ["", "## method", "", "| method | what it trains |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in METHODS.items()]
    for name, (text, keys) in sections().items():
        if not name:
            continue
        lines += ["", f"## {name}", "", text, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys:
            cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")

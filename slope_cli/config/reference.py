"""The reference of all keys, for `slope config` and docs/config.md: type, default and meaning, from the schema."""

import ast
import fnmatch
import functools
import inspect
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import yaml

from slope_cli.config.configs import container, defaults
from slope_cli.config.schema import AUTO, METHODS, Config, SparsityConfig
from slope_cli.config.section import Facts, Section, facts_of
from slope_cli.config.values import flat, type_in_words, unknown_key
from slope_cli.errors import UsageError
from slope_cli.report.terminal import wrapped


class Key(NamedTuple):
    """A key: its full name, its type in words, its default as YAML, its meaning, and its `Facts`."""

    name: str
    type: str
    default: str
    meaning: str
    facts: Facts

    @property
    def example(self) -> str:
        """The key with another value than its default, as a word of a shell's command line."""
        return shlex.quote(f"{self.name}={self.facts.example}")


@functools.cache
def sections() -> Mapping[str, tuple[str, list[Key]]]:
    """The docstring and the keys of each section, in order; "" stands for keys outside of sections."""
    documented: dict[str, tuple[str, list[Key]]] = {"": ("", list(_keys(Config, "")))}
    for field in fields(Config):
        section = type(getattr(Config(), field.name))
        if issubclass(section, Section):
            documented[field.name] = inspect.getdoc(section) or "", list(_keys(section, f"{field.name}."))
    return documented


def _keys(section: type, prefix: str) -> Iterator[Key]:
    """The fields of a class that are not sections, each with the string below it."""
    (node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(node, ast.ClassDef)
    facts = facts_of(section)
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if statement.target.id not in facts:
            continue
        name, own = f"{prefix}{statement.target.id}", facts[statement.target.id]
        documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        meaning = inspect.cleandoc(str(following.value.value)) if documented else ""  # type: ignore[union-attr]
        auto = f" auto: {AUTO[name]}." if name in AUTO else ""
        yield Key(name, type_in_words(name), _default(name), " ".join(meaning.split()) + auto, own)


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


def explain(queries: Sequence[str] = ()) -> list[str]:
    """Lines about keys, all keys of a section, or all that a pattern such as *.lr fits; without a query, all sections.

    Raises:
        UsageError: there is no such key or section; the message suggests similar names.
    """
    parts = [_explain(query) for query in queries] or [_overview()]
    return [line for number, part in enumerate(parts) for line in (*[""] * (number > 0), *part)]


def _overview() -> list[str]:
    lines = ["method", *_methods(), "", "sections"]
    for name, (text, _) in sections().items():
        lines += _row(name, text) if name else []
    examples = (
        "slope config optim.lr explains a key, slope config optim a section, slope config '*.lr' all keys like this"
    )
    return [*lines, "", *wrapped(examples)]


def _explain(query: str) -> list[str]:
    documented = sections()
    if query and query in documented:
        text, keys = documented[query]
        return [*wrapped(text), "", *_entries(keys)]
    everything = {key.name: key for _, keys in documented.values() for key in keys}
    if query in everything:
        return [*_entries([everything[query]]), *(_methods() if query == "method" else [])]
    if keys := [everything[name] for name in everything if fnmatch.fnmatchcase(name, query)]:
        return _entries(keys)
    raise UsageError(unknown_key(query))


def _methods() -> list[str]:
    return [line for name, meaning in METHODS.items() for line in _row(name, meaning)]


def _row(name: str, text: str) -> list[str]:
    return wrapped(text, f"  {name:13}", " " * 15)


def _entries(keys: Sequence[Key]) -> list[str]:
    """The lines of keys, with an empty one between two."""
    lines: list[str] = []
    for key in keys:
        lines += [*[""] * bool(lines), *wrapped(f"{key.name}: {key.type}; default {key.default}", "", " " * 4)]
        about = [key.meaning]
        about += [f"choices: {', '.join(key.facts.choices)}"] if key.facts.choices else []
        about += [f"unit: {key.facts.unit}"] if key.facts.unit else []
        for text in (*about, f"example: {key.example}"):
            lines += wrapped(text, " " * 4)
    return lines


def markdown() -> str:
    """The text of docs/config.md."""
    lines = ["# Configuration", ""]
    lines += ["Every key with its type, default, meaning, and choices or unit if it has any. If the default depends on"]
    lines += [
        "the method, those of other methods are in brackets. A recipe is YAML with these keys; on the command line"
    ]
    lines += ["they are KEY=VALUE, as in the examples."]
    lines += ["`slope config KEY` prints the same, and `slope pretrain RECIPE --dry-run` the values of a run."]
    lines += ["", "This page is generated by `python -m slope_cli.config.reference`."]
    lines += ["", "## method", "", "| method | what it trains |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in METHODS.items()]
    for name, (text, keys) in sections().items():
        if not name:
            continue
        lines += ["", f"## {name}", "", text, ""]
        lines += ["| key | type | default | meaning | choices or unit | example |", "|---|---|---|---|---|---|"]
        for key in keys:
            values = ", ".join(f"`{choice}`" for choice in key.facts.choices) or key.facts.unit
            cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.meaning, values, f"`{key.example}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")

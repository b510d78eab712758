"""The values of keys as they are written: YAML, in which a key of type text takes the word as it stands.

YAML would read 12345e67 as a number, No as false and what follows " #" as a comment. What no value can mean is refused:
an interpolation, omegaconf's ??? and numbers of another base than 10 in disguise.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf

from slope_cli.config.migrate import migrate
from slope_cli.config.schema import Config
from slope_cli.config.section import Facts, Section, facts_of
from slope_cli.errors import UsageError, is_utf8, nearest

Flat = dict[str, Any]
"""Full keys and their values."""
TYPES: Mapping[Any, str] = {
    Any: "list, or text",
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    bool | str: "true, false or auto",
    tuple[float, float]: "two numbers",
    list[str]: "list of texts",
    list[int]: "list of whole numbers",
    list[list[int]]: "list of lists of whole numbers",
    dict[str, Any]: "mapping",
    dict[str, list[int]]: "mapping",
}
"""The types of keys in words."""
_TEXT, _MAP, _NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "null"))


@functools.lru_cache(maxsize=64)
def from_recipe(text: str) -> Mapping[str, Any]:
    """The keys of a recipe or config file, in YAML.

    Raises:
        UsageError: it is no mapping, or has a value that is refused.
    """
    root = yaml.compose(text, yaml.SafeLoader) or yaml.MappingNode(_MAP, [])
    return _flat_values(root)


@functools.lru_cache(maxsize=256)  # a command asks several times what its words set
def from_word(key: str, value: str) -> Mapping[str, Any]:
    """The keys that KEY=VALUE sets: VALUE is YAML, or for a key of type text as written, or quoted.

    Raises:
        UsageError: an empty text, or a value that is refused.
    """
    refuse_special({key: value})  # before YAML, which has no escape for some bytes
    if is_text(key):
        if not value:
            also = ", or null for none" if may_be_null(key) else ""
            raise UsageError(f"{key}=: is empty; write a value, {key}='\"\"' for an empty text{also}")
        null = value == "null" and may_be_null(key)
        node: yaml.Node = yaml.ScalarNode(_NULL if null else _TEXT, value if null else _unquoted(value))
    else:
        node = yaml.compose(value, yaml.SafeLoader) or yaml.ScalarNode(_NULL, "null")
    return _flat_values(yaml.MappingNode(_MAP, [(yaml.ScalarNode(_TEXT, key), node)]))


def flat(tree: Any, prefix: str = "") -> Flat:
    """Every full key below a node of a config, or of any JSON object, and its value."""
    keys: Flat = {}
    for name, value in tree.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return keys


def is_text(key: str) -> bool:
    """Whether a key, under its present name or an earlier one, is of type text."""
    return _kind(key) in (str, str | None)


def may_be_null(key: str) -> bool:
    """Whether a key of type text may be null."""
    return _kind(key) is not str


@functools.cache
def known_keys() -> Mapping[str, Facts]:
    """Every full key, a mapping as one, and its facts."""
    sections = (
        kind for kind in get_type_hints(Config).values() if isinstance(kind, type) and issubclass(kind, Section)
    )
    of_sections = {f"{each.section}.{name}": own for each in sections for name, own in facts_of(each).items()}
    return {**facts_of(Config), **of_sections}


def near_keys(word: str) -> list[str]:
    """The whole keys that are nearest to an unknown one."""
    section, _, name = word.rpartition(".")
    keys = list(known_keys())
    if same := [key for key in keys if key.endswith(f".{name}")]:  # lr for optim.lr
        return nearest(word, same, cutoff=0)
    if own := [key for key in keys if section and key.startswith(f"{section}.")]:
        return nearest(word, own)
    written = {key if section else key.rpartition(".")[2]: key for key in reversed(keys)}
    return [written[each] for each in nearest(word, written)]


def unknown_key(word: str) -> str:
    """A line about an unknown key, with the nearest whole keys, or the known ones of its section, or all sections."""
    keys, section = list(known_keys()), word.rpartition(".")[0]
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    if near := near_keys(word) or nearest(word, sections if "." not in word else ()):
        return f"{word}: unknown key; did you mean {' or '.join(near)}?"
    known = [key for key in keys if key.startswith(f"{section}.")] or sections
    return f"{word}: unknown key; known are {', '.join(known)}; see `slope config`"


def type_rule(key: str, value: Any) -> str:
    """That a key, or one below it, must have its type and not this value."""
    own = next(own for own in known_keys() if f"{key}.".startswith(f"{own}."))
    kind = type_in_words(own)
    article = "a " if kind.startswith(("whole", "number", "list", "mapping")) else ""
    written = "null" if value is None else value
    return f"{key}={written}: must be {article}{kind}, such as {own}={known_keys()[own].example}"


def type_in_words(key: str) -> str:
    """The type of a key, such as "whole number or null"."""
    kind = _kind(key)
    if kind in TYPES:
        return TYPES[kind]
    (own,) = (own for own in TYPES if kind == own | None)
    return f"{TYPES[own]} or null"


def refuse_special(keys: Mapping[str, Any]) -> None:
    """UsageError for no text, or what omegaconf would replace: an interpolation could bring in the environment."""
    for key, value in keys.items():
        if not is_utf8(f"{key}{value}"):
            raise UsageError(f"{key}={value}: is not text in UTF-8")
        if "${" in f"{key}{value}":
            raise UsageError(f"{key}={value}: is an interpolation; write the value itself")
        if value == "???" or (isinstance(value, list) and "???" in value):
            raise UsageError(f"{key}={value}: ??? stands for a missing value; write the value itself")


@functools.cache
def _kind(key: str) -> Any:
    """The type of a key, under its present name or an earlier one; None for an unknown one."""
    (current,) = migrate({key: ""})[0]
    section, _, name = current.rpartition(".")
    kind = get_type_hints(Config).get(section) if section else Config
    return get_type_hints(kind).get(name) if kind in (Config, *Section.__subclasses__()) else None


def _unquoted(value: str) -> str:
    """The text inside one pair of quotes, or the word as written."""
    if value[0] not in "'\"":
        return value
    try:
        node = yaml.compose(value, yaml.SafeLoader)
    except yaml.YAMLError:
        return value
    return str(node.value) if isinstance(node, yaml.ScalarNode) and value[-1] == value[0] else value


def _flat_values(root: yaml.Node) -> Flat:
    _settle(root, "", set())
    tree = OmegaConf.to_container(OmegaConf.create(yaml.serialize(root, Dumper=yaml.SafeDumper)))
    if not isinstance(tree, dict):
        raise UsageError("is not a mapping of keys to values")
    keys = flat(tree)
    refuse_special(keys)
    return keys


def _settle(node: yaml.Node, key: str, seen: set[int]) -> None:
    """Mark what is text as text, and refuse numbers in disguise and duplicate keys, below a node."""
    if id(node) in seen:  # an alias, perhaps of a node around it
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        if not node.value and key in known_keys() and type_in_words(key) != "mapping":
            raise UsageError(type_rule(key, {}))  # it would set nothing, silently
        names = set()
        for name, value in node.value:
            if name.value in names:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name.value}", problem_mark=name.start_mark)
            names.add(name.value)
            if name.tag != "tag:yaml.org,2002:merge":
                _to_text(name)
            _settle(value, f"{key}.{name.value}".removeprefix("."), seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _settle(value, key, seen)
            if _kind(key) == list[str]:
                _to_text(value)
    elif is_text(key):
        if node.tag != _NULL:
            _to_text(node)
    elif node.style in (None, ""):
        _refuse_disguised(node, key)


def _to_text(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode):
        node.tag, node.style = _TEXT, '"'


def _refuse_disguised(node: yaml.Node, key: str) -> None:
    """YAML 1.1 reads 2:4 as the base-60 number 124 and 010 as the octal number 8, silently."""
    if node.tag.endswith((":int", ":float")) and ":" in node.value:
        n, m = node.value.split(":")[:2]
        raise UsageError(f"{key}: {node.value} would be read as a base-60 number; say sparsity.n={n} sparsity.m={m}")
    if _kind(key) != list[str] and re.fullmatch(r"[-+]?0[0-9_]+", node.value):
        raise UsageError(f"{key}: {node.value} would be read as an octal number; leave out the leading 0")

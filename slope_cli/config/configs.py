"""Reads, migrates, merges, compares and writes configurations: recipes, KEY=VALUE overrides and config files.

Everything is strict: an unknown key, a wrong type or a value out of range is a UsageError that says what to set.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slope_cli.config.migrate import migrate
from slope_cli.config.schema import AUTO, FREE_KEYS, METHODS, MICRO_BATCH, Config
from slope_cli.config.section import Section
from slope_cli.config.values import (
    Flat,
    flat,
    from_recipe,
    from_word,
    is_text,
    known_keys,
    may_be_null,
    refuse_special,
    type_rule,
    unknown_key,
)
from slope_cli.errors import UsageError, did_you_mean, first_line, os_reason

# ------------------------------------------------------------------------------------------------------------ recipes


def recipe_names() -> list[str]:
    """The names of the recipes in the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _recipes().iterdir() if f.name.endswith(".yaml"))


def _recipes() -> Any:
    return resources.files("slope_cli.recipes")


def recipe_text(name: str) -> str:
    """The YAML of a recipe, by its name in the package or a file's path.

    Raises:
        UsageError: there is no such recipe; the message suggests similar names.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"{name}: is not a text file; give a recipe in YAML") from None
        except OSError as error:
            raise UsageError(f"{name}: cannot be read: {os_reason(error)}") from None
    if name not in recipe_names():
        raise UsageError(f"{name}: no recipe of this name; {did_you_mean(name, recipe_names())}")
    text: str = (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")
    return text


def recipe_data(name: str) -> str:
    """How the data of a recipe are prepared, by the line of its head that says so; empty without one."""
    line = re.search(r"^# Data: (.*slope data prepare.*)$", recipe_text(name), re.MULTILINE)
    return line[1] if line else ""


# ------------------------------------------------------------------------------------------------------------ loading


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Merge the defaults, the recipe and the overrides, in this order.

    Keys of older versions are renamed, with a warning on standard error.

    Args:
        recipe: a name of `recipe_names()` or the path of a YAML file.
        overrides: each KEY=VALUE, for example "optim.lr=1e-3".

    Raises:
        UsageError: an unknown recipe or key, a wrong type, a value out of range, a key of another method's section.
    """
    text = recipe_text(recipe)
    with _one_line(f"{recipe}: "):
        written = from_recipe(text)
    parsed = [parse_override(override) for override in overrides]
    own_method = str(written.get("method", "slope"))
    method = next((str(keys["method"]) for keys in reversed(parsed) if "method" in keys), own_method)
    tree = _default_tree()
    with _one_line(f"{recipe}: "):
        _merge(tree, _current(written, method, f"{recipe}: ", own_method))
    with _one_line(""):
        _merge(tree, *(_current(keys, method, "") for keys in parsed))
    return _config(tree)


def load_with_usual_rates(recipe: str, overrides: Sequence[str]) -> Config:
    """As `load`, but for overrides of learning rates."""
    return load(recipe, [word for word in overrides if not any(key.endswith("lr") for key in parse_override(word))])


def load_saved(path: Path) -> Config:
    """The configuration that `dump` wrote, in this version or an older one; raises as `load`."""
    return copy.deepcopy(_saved_text(recipe_text(str(path)), f"{path}: "))


@functools.lru_cache(maxsize=64)  # a command asks for the configuration of one run many times
def _saved_text(text: str, where: str) -> Config:
    with _one_line(where):
        return _saved(from_recipe(text), where)


def from_fixed(keys: Mapping[str, str], where: str) -> Config:
    """The configuration with these `fixed` keys, of this version or an older one, and defaults for all others.

    Raises:
        UsageError: keys or values that this version does not know; the message begins with `where`.
    """
    with _one_line(f"{where}: "):
        values = {key: _literal(key, text) for key, text in keys.items()}
        refuse_special(values)
        return _saved(values, "")


def _literal(key: str, text: str) -> Any:
    if is_text(key):
        return None if text == "None" and may_be_null(key) else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _saved(keys: Mapping[str, Any], where: str) -> Config:
    """A configuration that `dump` wrote; older versions wrote the sections of all methods."""
    method = str(keys.get("method"))
    current, renamed = migrate(keys, method)
    current = _without_other_methods(current, method)
    if where:
        _note(where, {old: new for old, new in renamed.items() if new in current})
    if method == "wanda":  # older versions chose its masks by wanda whatever this key said
        current.pop("sparsity.mask", None)
    tree = _default_tree()
    _merge(tree, current)
    return _config(tree)


def _config(tree: DictConfig) -> Config:
    with _one_line(""):
        config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    return config


def parse_override(override: str) -> Mapping[str, Any]:
    """The keys that KEY=VALUE sets, and their values. VALUE is YAML, or for a key of type text as written or quoted.

    Raises:
        UsageError: it is not KEY=VALUE.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override}: is not KEY=VALUE, such as train.steps=100")
    with _one_line(""):
        return from_word(key, value)


def _current(keys: Mapping[str, Any], method: str, where: str, own_method: str = "") -> Flat:
    """Keys under their current names, without those of other methods' sections, which must have their default values.

    Args:
        own_method: the recipe's method, whose section may have any values if another method was chosen.

    Raises:
        UsageError: a key of another method's section, set to another value.
    """
    current, renamed = migrate(keys, method, own_method)
    _note(where, renamed)
    kept = _without_other_methods(current, method)
    for key, value in current.items():
        if key not in kept and _section(key) != own_method and value != defaults()[key]:
            raise UsageError(f"{key}: only method={_section(key)} reads this key, and the method is {method}")
    return kept


def _note(where: str, renamed: Mapping[str, str]) -> None:
    if renamed:
        _print_once(f"warning: {where}{'; '.join(f'{old} is now {new}' for old, new in renamed.items())}")


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr)  # however often a file is read


def _section(key: str) -> str:
    return key.partition(".")[0]


def _without_other_methods(keys: Flat, method: str) -> Flat:
    """The keys without those of other methods' sections. Unknown keys are kept: merging refuses them."""
    foreign = METHODS.keys() - {method} if method in METHODS else set()
    return {key: value for key, value in keys.items() if key not in defaults() or _section(key) not in foreign}


@functools.cache
def defaults() -> Mapping[str, Any]:
    """Every full key and its default, as written: some values follow from others."""
    return flat(OmegaConf.to_container(_defaults_made_once()))


def _default_tree() -> DictConfig:
    """The typed tree of the defaults, a new one each time."""
    return copy.deepcopy(_defaults_made_once())


@functools.cache
def _defaults_made_once() -> DictConfig:
    tree = OmegaConf.structured(Config)  # takes five times as long as a copy
    assert isinstance(tree, DictConfig)
    return tree


def _merge(tree: DictConfig, *parts: Flat) -> None:
    """Set these keys in the tree, in this order; UsageError for an unknown key or a value of a wrong type."""
    try:
        _set(tree, *parts)
    except (OmegaConfBaseException, TypeError, ValueError, OverflowError):
        for keys in parts:
            for key, value in keys.items():  # omegaconf does not always name the wrong one
                with _named(key, value):
                    _set(tree, {key: value})


@contextlib.contextmanager
def _named(key: str, value: Any) -> Iterator[None]:
    """Turn omegaconf's refusal of a key into a plain sentence."""
    try:
        yield
    except (OmegaConfBaseException, TypeError, ValueError, OverflowError):
        known = any(f"{key}.".startswith(f"{own}.") for own in known_keys())
        raise UsageError(type_rule(key, value) if known else unknown_key(key)) from None


def _set(tree: DictConfig, *parts: Flat) -> None:
    written: dict[str, Any] = {}  # merged once: each merging takes as long as a hundred keys
    for key, value in (entry for keys in parts for entry in keys.items()):
        if known := _keys(key):
            raise UsageError(f"{key}={value}: is a section; set its keys, such as {key}.{known[0]}")
        *parents, last = key.split(".")
        node = written
        for name in parents:
            if not isinstance(node.get(name), dict):  # also where an earlier part has a value
                node[name] = {}
            node = node[name]
        node[last] = value
    tree.merge_with(OmegaConf.create(written))


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Turn errors into one line that begins with the file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{where}line {line} is not YAML: {error.problem}") from None
    except RecursionError:
        raise UsageError(f"{where}is nested too deeply") from None
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise UsageError(f"{where}{first_line(error).removesuffix('.')}") from None


@functools.cache
def _keys(section: str) -> Sequence[str]:
    """The names of a section's keys; none if there is no such section."""
    found = getattr(Config(), section, None)
    return [f.name for f in fields(found)] if is_dataclass(found) else []


# ----------------------------------------------------------------------------------------------- writing and comparing


def container(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries, without sections that have no effect with its method."""
    idle = _idle_sections(config)
    return {name: value for name, value in _plain(config).items() if name not in idle}


def _plain(value: Any) -> Any:
    """Sections as dictionaries, tuples as lists, and copies of lists and dictionaries."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _idle_sections(config: Config) -> set[str]:
    sections = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "method"}
    foreign = METHODS.keys() & sections.keys() - {config.method}
    return {
        name
        for name, section in sections.items()
        if name in foreign or len(section.unused(config)) == len(vars(section))
    }


def dump(config: Config) -> str:
    """The configuration as YAML, without sections that have no effect; comments say what "auto" stands for."""
    lines = OmegaConf.to_yaml(OmegaConf.create(container(config))).splitlines()
    section = ""
    for number, line in enumerate(lines):
        name, _, value = line.partition(":")
        section = name if not line.startswith(" ") else section
        if value == " auto" and (meaning := AUTO.get(f"{section}.{name.strip()}")):
            lines[number] = f"{line}  # {meaning}"
    return "\n".join(lines) + "\n"


def fixed(config: Config) -> dict[str, str]:
    """Every full key and its value, as text, apart from sections that have no effect, and from FREE_KEYS but for the
    one that others are checked against.
    """
    free = tuple(f"{key}." for key in FREE_KEYS if key != MICRO_BATCH)
    return {key: str(value) for key, value in flat(container(config)).items() if not f"{key}.".startswith(free)}


def follows(config: Config, key: str) -> bool:
    """Whether a key's value differs from its default only because it follows from other keys."""
    keys = flat(container(config))
    if key not in defaults() or keys[key] == defaults()[key]:
        return False
    try:
        return _saved({name: value for name, value in keys.items() if name != key}, "") == config
    except UsageError:  # the others are not valid without it
        return False


def differences(old: Config, new: Config) -> list[str]:
    """The keys, apart from FREE_KEYS, in which two configurations differ, each as "key: old -> new"."""
    before, after = fixed(old), fixed(new)
    keys = {*before, *after} - {MICRO_BATCH} - (old.following_lr & new.following_lr)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}" for key in sorted(keys) if before.get(key) != after.get(key)
    ]


def free_differences(old: Config, new: Config) -> list[str]:
    """The keys of FREE_KEYS, but for train.micro_batch, in which two configurations differ, as `differences`."""
    bound, before, after = {*fixed(old), *fixed(new)}, flat(container(old)), flat(container(new))
    keys = sorted({*before, *after} - bound)
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def extended(config: Config, saved: Config, step: int) -> Config:
    """A configuration for going on with the run of a saved one after a step: with the lengths that the run has had."""
    own, then = config.train, saved.train
    if own.steps < then.steps:
        return config
    lengths = then.extended if own.steps == then.steps else [*then.extended, [step, then.steps]]
    return replace(config, train=replace(own, extended=lengths))


def lengthened(saved: Config, config: Config) -> Config:
    """The saved configuration, with the steps of another one of the same run if that was extended since."""
    own, now = saved.train, config.train
    lengths = [*now.extended, [0, now.steps]]
    count = len(own.extended)
    if count < len(lengths) and lengths[:count] == own.extended and lengths[count][1] == own.steps:
        return replace(saved, train=replace(own, steps=now.steps, extended=now.extended))
    return saved


def without_effect(config: Config, overrides: Sequence[str]) -> list[str]:
    """A line for each key that an override changed from its default although this configuration does not use it.

    Recipes are not checked: with another method than their own, their keys may well have no effect.
    """
    written: Flat = {}
    for override in overrides:
        written |= migrate(parse_override(override), config.method)[0]
    values, usual = flat(_plain(config)), flat(_plain(Config()))
    lines = []
    for key, value in written.items():
        section, _, name = key.partition(".")
        own = getattr(config, section, None)
        cause = own.unused(config).get(name.partition(".")[0]) if isinstance(own, Section) else None
        # Compared both as written and as resolved: either may be the default.
        changed = value != defaults().get(key) and values.get(key) != usual.get(key)
        if cause and changed:
            lines.append(f"{key}={values.get(key)}: has no effect with {cause}")
    return lines

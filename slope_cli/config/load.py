"""Recipes, overrides and config files: read, merged, checked, compared and written."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slope_cli.config.schema import FREE_KEYS, Config
from slope_cli.errors import UsageError


def recipe_names() -> list[str]:
    """The names of the recipes in the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _recipes().iterdir() if f.name.endswith(".yaml"))


def _recipes() -> Any:
    return resources.files("slope_cli.recipes")


def recipe_text(name: str) -> str:
    """The YAML of a recipe, by its name in the package or a file's path.

    Raises:
        UsageError: there is none, with the nearest names.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"{name}: is not a text file; give a recipe in YAML") from None
        except OSError as error:
            raise UsageError(f"{name}: cannot be read: {error.strerror}") from None
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `slope recipes`"
        raise UsageError(f"{name}: no recipe of this name; {hint}")
    text: str = (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")
    return text


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the recipe, then the overrides.

    Args:
        recipe: a name of `recipe_names()` or the path of a YAML file.
        overrides: words KEY=VALUE, for example "optim.lr=1e-3".

    Raises:
        UsageError: an unknown recipe or key, a wrong type, a value out of range.
    """
    text = recipe_text(recipe)
    merged = OmegaConf.structured(Config())
    with _one_line(f"{recipe}: "):
        _refuse_base_60(yaml.compose(text, yaml.SafeLoader), "")
        merged = _merge(merged, OmegaConf.create(text))
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word}: is not KEY=VALUE; say for example train.steps=100")
        with _one_line(""):
            _refuse_base_60(yaml.compose(value, yaml.SafeLoader), key)
            merged = _merge(merged, OmegaConf.from_dotlist([word]))
    with _one_line(""):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _merge(config: DictConfig, changes: Any) -> DictConfig:
    if not isinstance(changes, DictConfig):
        raise UsageError("is not a mapping of keys to values")
    for name, value in ((str(key), value) for key, value in changes.items()):
        if (section := _keys([name])) and not isinstance(value, DictConfig):
            raise UsageError(f"{name}={value}: is a section; set its keys, such as {name}.{section[0]}")
    merged = OmegaConf.merge(config, changes)
    assert isinstance(merged, DictConfig)
    return merged


def _refuse_base_60(node: yaml.Node | None, key: str) -> None:
    """YAML 1.1 reads 2:4 as the base-60 number 124, silently."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            _refuse_base_60(value, f"{key}.{name.value}".removeprefix("."))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_base_60(value, key)
    elif isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and ":" in node.value:
        n, m = node.value.split(":")[:2]
        raise UsageError(f"{key}: {node.value} would be read as a base-60 number; say sparsity.n={n} sparsity.m={m}")


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Turn what omegaconf and YAML raise into one line: the file, the full key, what is wrong, the nearest key."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{where}line {line} is not YAML: {error.problem}") from None
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise UsageError(f"{where}{_reason(error)}") from None


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()[0].removesuffix(".")
    full_key = str(getattr(error, "full_key", None) or "")
    if first.startswith("TupleConfig length"):  # omegaconf names no key here; only one has such a type
        return "optim.betas: needs two numbers, such as [0.9, 0.95]"
    if not full_key or "not in" not in first:
        return f"{full_key}: {first}" if full_key else first
    *parents, wrong = full_key.split(".")
    known = _keys(parents)
    near = difflib.get_close_matches(wrong, known, n=1)
    hint = f"did you mean {'.'.join([*parents, *near])}?" if near else f"known are {', '.join(known)}"
    return f"{full_key}: unknown key; {hint}"


def _keys(parents: Sequence[str]) -> list[str]:
    section: Any = Config()
    for parent in parents:
        section = getattr(section, parent, None)
    return [f.name for f in fields(section)] if is_dataclass(section) else []


def dump(config: Config) -> str:
    """The whole configuration as YAML that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old: Config, new: Config) -> list[str]:
    """The keys, apart from FREE_KEYS, in which two configurations differ, each as "key: old -> new"."""
    return changes(fixed(old), fixed(new))


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The keys in which two results of `fixed` differ, each as "key: old -> new"."""
    keys = sorted({*old, *new})
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def fixed(config: Config) -> dict[str, str]:
    """Every full key and its value, as text, apart from FREE_KEYS."""
    keys = flat(OmegaConf.structured(config))
    return {
        key: str(value)
        for key, value in keys.items()
        if not f"{key}.".startswith(tuple(f"{free}." for free in FREE_KEYS))
    }


def flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Every full key below a node of a config, or of any JSON, and its value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found

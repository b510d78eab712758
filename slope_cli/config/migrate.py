"""Renamed keys: recipes, command lines and runs of older versions still work.

A flat configuration maps full keys, such as "train.steps", to values.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from slope_cli.config.schema import Config

RENAMED = {
    "sparsity.blocks": "sparsity.pattern_overrides",
    "sparsity.skip": "sparsity.exclude_modules",
    "linearize.map": "linearize.feature_map",
    "linearize.distill": "distill.share",
    "train.dtype": "train.precision",
}
"""The current names of keys, or of the beginnings of keys."""
MOVED = {
    "sparsity.before": ("before", "slope"),
    "sparsity.rescale": ("rescale", "slope"),
    "sparsity.renew_every": ("mask_update_interval", "slope", "sr_ste", "fst"),
    "sparsity.column_mask": ("backward_mask", "slope"),
    "sparsity.column_rescale": ("backward_rescale", "slope"),
    "sparsity.decay": ("decay", "slope", "sr_ste", "fst"),
    "sparsity.dense_finish": ("dense_finish", "fst"),
}
"""Keys that moved into the sections of methods: their name there, and the methods."""
DEFAULTED = ("train.compile", "train.cuda_graph", "sparsity.renew_every")
"""Keys whose null meant the default, which has a value now."""


def migrate(flat: Mapping[str, Any], *methods: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A flat configuration under the current keys, and the renamed keys with their new names.

    Args:
        methods: a key that moved goes into the section of the first of these that reads it.
    """
    current: dict[str, Any] = {}
    renamed = {}
    for key, value in flat.items():
        new = _renamed(key, methods)
        if new != key:
            renamed[key] = new
        current[new] = reduce(getattr, new.split("."), Config()) if value is None and key in DEFAULTED else value
    return current, renamed


def _renamed(key: str, methods: tuple[str, ...]) -> str:
    if key in MOVED:
        name, *readers = MOVED[key]
        return f"{next((method for method in methods if method in readers), readers[0])}.{name}"
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key

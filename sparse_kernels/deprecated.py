"""Names of version 0.1, which still work, with a FutureWarning; they go in version 0.3."""

import functools
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

FUNCTIONS = {
    "Report": "ModelReport",
    "densify": "to_dense",
    "finish_dense": "remove_masks",
    "plan": "select_layers",
    "renew_column_masks": "update_backward_masks",
    "renew_masks": "update_masks",
}
"""Of the package."""
ARGUMENTS = {
    "blocks": "pattern_overrides",
    "column_rescale": "backward_rescale",
    "columns": "backward",
    "only": "target_modules",
    "skip": "exclude_modules",
}
"""Of `select_layers`, `sparsify`, `mask_layers` and `update_masks`."""
TENSORS = {
    "positions": "row_mask_bits",
    "positions_t": "backward_mask_bits",
    "column_scale": "backward_scale",
    "A": "lora_A",
    "B": "lora_B",
}
"""Of layers and their adapters, as attributes and in state_dict."""


def warn(old: str, new: str) -> None:
    """Tell the caller of a function here that a name has changed."""
    warnings.warn(f"sparse_kernels: {old} is now {new}", FutureWarning, stacklevel=3)


def renamed_arguments(function: F) -> F:
    """The function, which takes its keyword arguments by their old names as well."""

    @functools.wraps(function)
    def wrapped(*args: Any, **arguments: Any) -> Any:
        for old in arguments.keys() & ARGUMENTS:
            warn(old, ARGUMENTS[old])
            arguments[ARGUMENTS[old]] = arguments.pop(old)
        return function(*args, **arguments)

    return wrapped  # type: ignore[return-value]


def renamed(old: str, new: str) -> property:
    """An attribute under its old name."""

    def read(owner: Any) -> Any:
        warn(old, new)
        return getattr(owner, new)

    def write(owner: Any, value: Any) -> None:
        warn(old, new)
        setattr(owner, new, value)

    return property(read, write)


def rename_saved(state: MutableMapping[str, Any], prefix: str, names: Mapping[str, str] = TENSORS) -> None:
    """Give the tensors of one module in a state_dict their present names, in place."""
    for old, new in names.items():
        if f"{prefix}{old}" in state:
            state[f"{prefix}{new}"] = state.pop(f"{prefix}{old}")

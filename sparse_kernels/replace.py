"""Putting one module in another's place without losing what the model had there, and lending one a forward pass."""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from sparse_kernels.masked_linear import MaskedLinear

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def obstacle(linear: nn.Module) -> str:
    """What a linear layer has that another layer in its place would lose; empty if nothing.

    `replace_module` carries over the training mode and the hooks of forward and backward passes. Whatever computes the
    weight, or goes by its name or shape, cannot be carried over.
    """
    if parametrize.is_parametrized(linear):
        return "has a parametrization (torch.nn.utils.parametrize)"
    if isinstance(linear, nn.Linear | MaskedLinear) and type(linear) not in (nn.Linear, MaskedLinear):
        return f"is a {type(linear).__name__}, a subclass, which may compute something else"
    if "forward" in vars(linear):
        return "has a forward of its own"
    for name in ("weight", "bias"):
        parameter = linear._parameters.get(name)
        if parameter is None and (name == "weight" or getattr(linear, name) is not None):
            return f"its {name} is made of other tensors (weight_norm, torch.nn.utils.prune or the like)"
        if parameter is not None and (reason := _obstacle_of(parameter)):
            return f"its {name} {reason}"
    known = (
        {"weight", "bias", "mask", "scale", "fp8_counts"} if isinstance(linear, MaskedLinear) else {"weight", "bias"}
    )
    own = (*linear._parameters, *linear._buffers, *linear._modules)
    if extra := [name for name in own if name not in known]:
        return f"has a {extra[0]!r}, which a linear layer does not have"
    if any(getattr(linear, hooks) for hooks in _STATE_HOOKS):
        return "has hooks of its state_dict"
    return "is compiled on its own: compile afterwards" if linear._compiled_call_impl is not None else ""


def _obstacle_of(parameter: nn.Parameter) -> str:
    if type(parameter) is not nn.Parameter:
        return f"is a {type(parameter).__name__}, not a plain parameter"
    if parameter.dtype not in _DTYPES:
        return f"is in {str(parameter.dtype).removeprefix('torch.')}"
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "has hooks of its gradient"
    return ""


def carry_over(old: nn.Parameter, new: nn.Parameter) -> None:
    """Give a parameter what another one was told: whether it is trained, and attributes such as an optimizer's tags."""
    new.requires_grad_(old.requires_grad)
    vars(new).update(vars(old))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is in a model, in the same mode and with its hooks, whose handles stay good.

    Raises:
        ValueError: `old` is not within the model, or is the whole of it.
    """
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    if not places:
        raise ValueError(f"a {type(old).__name__} that is the whole model cannot be replaced in place; wrap it")
    new.train(old.training)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for parent, name in places:
        parent._modules[name] = new


def lend_forward(layer: nn.Module, forward: Any, *, on: bool) -> None:
    """Let a layer have the forward pass of a class, from now on or no more; all else stays the layer's own.

    Meanwhile it is an instance of a subclass of both, as with torch.nn.utils.parametrize. Of several that are lent, the
    last one runs; they end in any order.
    """
    kind: Any = type(layer)
    layer.__class__ = _borrowing(forward, kind) if on else _without(forward, kind)


@functools.cache
def _borrowing(forward: Any, kind: Any) -> Any:
    return type(f"{forward.__name__.removeprefix('_')}{kind.__name__}", (forward, kind), {})


def _without(forward: Any, kind: Any) -> Any:
    lent, own = kind.__bases__
    return own if lent is forward else _borrowing(lent, _without(forward, own))

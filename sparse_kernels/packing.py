"""Packing a model for inference: its 2:4 layers become PackedLinear, whatever they are; the others stay dense."""

import torch
from torch import nn

from sparse_kernels.convert import dense_layer
from sparse_kernels.lora import AdaptedLinear
from sparse_kernels.masked_linear import MaskedLinear
from sparse_kernels.packed_linear import NotTwoOfFourError, PackedLinear
from sparse_kernels.replace import replace_module
from sparse_kernels.selection import is_conv1d, parameter_users, stays_itself
from sparse_kernels.sparse_linear import SparseLinear

_OURS = (SparseLinear, MaskedLinear, AdaptedLinear)


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every PackedLinear of a model by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@torch.inference_mode(False)
@torch.no_grad()
def pack_layers(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """Replace every linear layer that is 2:4 along its inputs by a PackedLinear, in place.

    That is: of every 4 weights of a row at most two are not zero. Adapters of packed layers stay beside them; those of
    layers that stay dense are merged into the weight, which costs nothing there. Output heads and layers that share
    their parameters stay dense. Nothing of the model can be trained afterwards.

    Args:
        dtype: of the packed values, biases and adapters.

    Returns:
        The names of the linear layers that stay dense, and why.

    Raises:
        ValueError: no layer is 2:4, or one has a value that is not finite in `dtype`; others may be packed by then.
    """
    users, dense, packed = parameter_users(model), {}, 0
    for name, layer in list(model.named_modules()):
        if not (isinstance(layer, (*_OURS, nn.Linear)) or is_conv1d(layer)):
            continue
        new: nn.Module | None = None
        reason = "" if isinstance(layer, _OURS) else stays_itself([name], layer, users)
        if not reason:
            try:
                new = PackedLinear.fuse([layer], dtype)
                packed += 1
            except NotTwoOfFourError:
                reason = "not 2:4 along its inputs"
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if reason:
            dense[name] = reason
            new = dense_layer(layer, merged=True) if isinstance(layer, _OURS) else None
        if new is not None:
            replace_module(model, layer, new)
    if not packed:
        raise ValueError(f"no linear layer of {type(model).__name__} is 2:4 along its inputs")
    model.requires_grad_(False)
    return dense

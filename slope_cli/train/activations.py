"""Activation checkpointing: a transformer block keeps its inputs alone, and the backward pass computes the rest again.

The numbers stay the same: dropout draws again what it drew. Modules, parameters and their names stay as they are.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from slope_cli.models.build import transformer_blocks
from sparse_kernels.ops import linear_fp8_op, linear_op

SPARSE = (linear_op._opoverload, linear_fp8_op._opoverload)
DENSE = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
FP8 = (torch.ops.aten._scaled_mm.default,)
ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)
NARROW = 8
"""A product is worth saving unless its output has more than this times the columns of its input: a low-rank adapter's
last product costs little, and its output is as large as that of the layer."""


class _Checkpointed:
    """The forward pass of a block: an object, so that a deep copy of the block gets one of its own."""

    def __init__(self, forward: Callable[..., Any], mode: str) -> None:
        self.forward = forward
        self.how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
        if mode == "selective":
            self.how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, saved)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, **self.how, **kwargs)


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Checkpoint each transformer block of a model, in place of what an earlier call chose.

    Call it before the blocks are compiled, and compile them again afterwards.

    Args:
        mode: "none", "block" (compute a whole block again) or "selective" (all but the outputs of its products and of
            attention).
    """
    for block in transformer_blocks(model):
        block.__dict__.pop("forward", None)
        if mode != "none":
            block.__dict__["forward"] = _Checkpointed(block.forward, mode)


def saved(context: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of mode "selective": save the outputs that take long to compute for their size."""
    wide = (op in DENSE and _wide(*args[-2:])) or (op in FP8 and _wide(*args[:2]))
    if op in SPARSE or wide or (op in ATTENTION and not _draws(op, args, kwargs)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _wide(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(right.shape[1] <= NARROW * right.shape[0])


def _draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an attention op drops weights: if it were not computed again, later dropout would draw other numbers."""
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    return bool(given.get("dropout_p", 0.0))

"""One optimizer step: forward and backward over its micro-batches, the check, clipping, the update, the masks' update.

Dense and sparse models take the same steps, so that they compare fairly. A step with a non-finite loss or gradient
raises before anything is updated.
"""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.sharding import Sharding
from slope_cli.errors import SlopeError
from slope_cli.methods.optim import moments_of
from slope_cli.models import shapes
from slope_cli.models.build import transformer_blocks
from slope_cli.models.loss import (
    Batch,
    CrossEntropy,
    Loss,
    LossAndGradient,
    forward,
    loss_and_gradient_,
    loss_fn,
    token_cross_entropy,
    training_loss,
)
from sparse_kernels import dense_gradients, update_masks, update_row_masks
from sparse_kernels.sharded import local

Around = contextlib.AbstractContextManager[Any]
"""A context in which a step clips its gradient and makes its updates, such as `changes.Changes`."""
NOTHING: Around = contextlib.nullcontext()
VARIANTS = 8
"""Of a block's compiled code, at most: of phases, and with and without gradients."""


class StepOutput(NamedTuple):
    """The numbers of a step before its update: means over its tokens, and the gradient norm before clipping.

    loss: the cross-entropy in nats of the predicted tokens, as in validation; in attention transfer the squared error
    of attention's output, the mean over layers. total: what was optimised, which may include BERT's next-sentence loss
    or a distillation loss. layers: in attention transfer the squared error of each layer, by the attention module's
    name.
    """

    loss: float
    total: float
    norm: float
    layers: dict[str, float] | None = None

    @property
    def kind(self) -> str:
        """Of its record in the log, one of metrics.STEPS."""
        return "train" if self.layers is None else "transfer"

    def record(self, *, layers: bool) -> dict[str, float | dict[str, float]]:
        """The numbers for the log: `total` where it is not the loss. layers: also those of each layer, if any."""
        if self.layers is None:
            total = {} if self.total == self.loss else {"total": self.total}
            return {"loss": self.loss, "grad_norm": self.norm, **total}
        each: dict[str, float | dict[str, float]] = {"layers": self.layers} if layers else {}
        return {"mse": self.loss, "grad_norm": self.norm, "total": self.total, **each}


class NonFinite(SlopeError):
    """A step's loss or gradient, which is `what`, is not finite."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(text)
        self.what = what


class MaskUpdate(NamedTuple):
    """How masks are updated after a step.

    backward, seed: of sparse layers' W^{R,C}; see `sparse_kernels.update_masks`.
    row_share: of the kept entries of each row, at most, that the step's gradient replaces before; see
        `sparse_kernels.update_row_masks`. 0 leaves the row masks as they are.
    """

    backward: str = "magnitude"
    seed: int = 0
    row_share: float = 0.0


class Step:
    """Takes the steps of one model and optimizer. Make a new one when parameters are added.

    In a group of several processes each has micro-batches of its own, equally many. A step is one over all of them:
    its gradient is that of the mean over the whole batch, and its numbers are the same on every rank. Gradients are
    averaged after the backward pass, in one order: DistributedDataParallel sums those of the first step after each
    start in another order than those of later steps, and a run that resumes would end with other bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype | None,
        clip: float,
        compiled: bool = False,
        group: Group | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        """
        Args:
            dtype: of autocast's products, or None for none.
            clip: largest norm of the gradient, 0 for no clipping.
            compiled: compile each transformer block and the loss.
            group: the processes that take the steps together; None for this one alone.
            sharding: how the model's weights are split over them; None if each has all.
        """
        self.group, self.sharding = group or Group(), sharding
        self.model, self.optimizer, self.dtype, self.clip = model, optimizer, dtype, clip
        self.cache_casts = True
        """Whether autocast may use a weight's cast again in the same forward pass."""
        self.cross_entropy: CrossEntropy = token_cross_entropy
        self.loss_and_gradient: LossAndGradient = loss_and_gradient_
        if compiled:
            require_compiler(model.device.type)
            self.cross_entropy = torch.compile(token_cross_entropy, dynamic=False)
            self.loss_and_gradient = torch.compile(loss_and_gradient_, dynamic=False)
            compile_blocks(model)

    def __call__(
        self,
        batches: Sequence[Batch],
        mask_update: MaskUpdate | None = None,
        around: Around = NOTHING,
    ) -> StepOutput:
        """Take one step.

        Args:
            batches: a micro-batch each, tensors on the model's device.
            mask_update: made after the weights' update; None for none.
            around: the update is made within it; its gradient is there before, averaged and not clipped.

        Raises:
            NonFinite: loss or gradient is not finite; names the layer. Nothing was updated.
        """
        targets = self.targets(batches)
        losses = torch.zeros(2, device=self.model.device)
        for number, batch in enumerate(batches, start=1):
            if self.sharding is not None:
                self.sharding.begin_micro_batch(self.model, last=number == len(batches))
            losses = losses + self.backward(batch, len(batches), targets)
        self.average_gradients()
        norm = self.norm()
        output = self.check(losses, norm, batches)
        gradients = self.dense_gradients(batches) if mask_update and mask_update.row_share else {}
        with around:
            self.update(norm)
            self.optimizer.zero_grad(set_to_none=True)
            if mask_update:
                self.update_masks(mask_update, gradients)
        return output

    def targets(self, batches: Sequence[Batch]) -> Tensor | None:
        """How many tokens a rank's micro-batches predict, as a mean over ranks, () float64; None if all predict equally
        many.
        """
        if (len(batches) == 1 and not self.group.several) or shapes.objective(self.model.config) == "causal":
            return None
        own = torch.stack([(batch["labels"] != IGNORED_LABEL).sum() for batch in batches]).sum()
        return self.group.mean_(own.double()).clamp(min=1 / self.group.ranks.world)

    def average_gradients(self) -> None:
        """Average the gradient over the ranks, but for that of split weights: the backward pass has averaged it."""
        if not self.group.several:  # nothing to do between the graphs of a step
            return
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.group.average_([grad for grad in grads if not isinstance(grad, DTensor)])

    def loss(self, batch: Batch) -> tuple[Loss, Tensor]:
        """The pretraining loss of one micro-batch, and the token loss to optimise."""
        loss = training_loss(self.model, batch, self.cross_entropy, self.loss_and_gradient)
        return loss, loss.token_loss

    def backward(self, batch: Batch, count: int, targets: Tensor | None) -> Tensor:
        """Add the gradient of one of `count` micro-batches; returns its share of (loss, total), detached, on device.

        Args:
            targets: as `targets` returns it. A micro-batch counts by its share of them.
        """
        share, total = self.shares(batch, count, targets)
        torch.autograd.backward(total)
        return torch.stack([share, total.detach()])

    def shares(self, batch: Batch, count: int, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """What one of `count` micro-batches adds to loss, detached, and total; as `backward`."""
        with self.autocast():
            loss, optimised = self.loss(batch)
            if targets is None:
                share = loss.token_loss.detach() / count
                total = optimised if loss.sentence_loss is None else optimised + loss.sentence_loss
                total = total / count
            else:
                weight = (loss.targets / targets).float()
                share, total = loss.token_loss.detach() * weight, optimised * weight
                total = total if loss.sentence_loss is None else total + loss.sentence_loss / count
        return share, total

    def dense_gradients(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The gradient of a step's total with respect to every sparse layer's dense weight, by the layer's name.

        It takes another forward and backward pass: the products of a step gather what is kept where they compute it, in
        operators that a CUDA graph or a compiled block cannot run differently in a few of its steps.
        """
        targets, sums = self.targets(batches), dict[str, Tensor]()
        for batch in batches:
            if self.sharding is not None:
                self.sharding.begin_micro_batch(self.model, last=True)
            total = functools.partial(self._total, batch, len(batches), targets)
            for name, gradient in dense_gradients(self.model, total).items():
                sums[name] = sums[name].add_(gradient) if name in sums else gradient
        self.group.average_(sums.values())
        return sums

    def _total(self, batch: Batch, count: int, targets: Tensor | None) -> Tensor:
        return self.shares(batch, count, targets)[1]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as in a step."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype is not None, cache_enabled=self.cache_casts)

    def norm(self) -> Tensor:
        """The norm of the whole gradient, on the device."""
        grads = [p.grad for p in self._trained() if p.grad is not None]
        whole = torch.nn.utils.get_total_norm([grad for grad in grads if not isinstance(grad, DTensor)])
        if self.sharding is None:
            return whole
        # Of this process's rows at once: torch would reduce the norm of each split matrix by itself.
        own = torch.nn.utils.get_total_norm([grad.to_local() for grad in grads if isinstance(grad, DTensor)])
        squares = self.sharding.sum_(own.to(self.model.device).square())
        return torch.sqrt(squares + whole.to(self.model.device).square())

    def update(self, norm: Tensor) -> None:
        """Clip by the gradient's `norm` and update; without waiting for the device."""
        if self.clip and self.sharding is None:
            torch.nn.utils.clip_grads_with_norm_(self._trained(), self.clip, norm)
        elif self.clip:
            factor = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([local(p.grad) for p in self._trained() if p.grad is not None], factor)
        self.optimizer.step()

    def update_masks(self, mask_update: MaskUpdate, gradients: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Choose the masks again; gradients: as `dense_gradients` returns them, if the row masks are updated."""
        if mask_update.row_share:
            moments = functools.partial(moments_of, self.optimizer)
            update_row_masks(self.model, gradients, mask_update.row_share, moments)
        if self.sharding is not None:
            self.sharding.update_masks(self.model, mask_update.backward, mask_update.seed)
            return
        update_masks(self.model, backward=mask_update.backward, seed=mask_update.seed)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.grad is not None]

    def check(self, losses: Tensor, norm: Tensor, batches: Sequence[Batch]) -> StepOutput:
        """A step's output from (loss, total) and the norm on the device; raises as a step does."""
        # The only time that the host waits in a step: the update runs while the host prepares the next batch.
        losses = self.group.mean_(losses.float())
        output = StepOutput(*torch.cat([losses, norm.float().reshape(1)]).tolist())
        if not math.isfinite(output.total):
            blame = self._blame(self._blame_forward(batches), "the loss is not finite, in the mean alone")
            raise NonFinite("loss", blame)
        if not math.isfinite(output.norm):
            if self.group.several and self.sharding is None:
                self._repeat_alone(batches)
            blame = self._blame(self._blame_gradient(), "the gradient is not finite, in the mean alone")
            raise NonFinite("gradient", blame)
        return output

    def _blame(self, fault: str, otherwise: str) -> str:
        """The faults of all ranks, in one sentence that is the same on each."""
        if not self.group.several:
            return f"{fault}; nothing was updated"
        faults = self.group.gather(f"{self.group.ranks.name}: {fault}" if fault else "")
        return f"{'; '.join(filter(None, faults)) or otherwise}; nothing was updated"

    def _repeat_alone(self, batches: Sequence[Batch]) -> None:
        """Compute the gradient of this rank's micro-batches again, before it is averaged."""
        self.optimizer.zero_grad(set_to_none=True)
        with eager():
            for batch in batches:
                self.backward(batch, len(batches), None)

    def _blame_forward(self, batches: Sequence[Batch]) -> str:
        """Run the forward pass again and name the first layer whose output is not finite; "" if all losses are."""
        bad: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, inputs: object, output: object) -> None:
                if isinstance(output, torch.Tensor) and not output.isfinite().all():
                    bad.append(name)

            return hook

        handles = [m.register_forward_hook(watch(name)) for name, m in self.model.named_modules() if name]
        with torch.no_grad(), self.autocast(), eager():
            losses = [loss_fn(forward(self.model, batch), batch).token_loss for batch in batches]
        for handle in handles:
            handle.remove()
        if self.group.several and all(bool(loss.isfinite()) for loss in losses):
            return ""
        where = f"first in the output of {bad[0]}" if bad else "in the loss itself"
        return f"the loss is not finite, {where}"

    def _blame_gradient(self) -> str:
        """Name the layer nearest to the loss whose gradient is not finite."""
        named = self.model.named_parameters()
        bad = [name for name, p in named if p.grad is not None and not local(p.grad).isfinite().all()]
        if self.group.several and not bad:
            return ""
        if not bad:
            return "every gradient is finite, but so large that their norm is not"
        return f"the gradient of {bad[-1]} is not finite ({len(bad)} in all)"


@functools.cache
def require_compiler(device: str) -> None:
    """Compile a small function for a type of device, once in a process.

    Raises:
        SlopeError: it fails, most often for want of a C++ compiler.
    """
    try:
        torch.compile(_small, dynamic=False)(torch.ones(4, device=device))
    except Exception as error:  # torch's, Triton's, or the compiler's own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
        raise SlopeError(
            f"torch.compile fails here ({reason[:300]}): install a C++ compiler such as g++, or set train.compile=false"
        ) from error


def _small(x: Tensor) -> Tensor:
    return x.sin() + 1


def compile_blocks(model: nn.Module) -> None:
    """Compile each transformer block for batches of one shape."""
    blocks = list(transformer_blocks(model))
    # Blocks may differ in a constant, such as GPT-2's scale of attention, which is another one in each. Beyond its
    # limit, 8 by default, torch would run the rest of them uncompiled.
    limits, most = torch._dynamo.config, len(blocks) * VARIANTS
    limits.recompile_limit = max(limits.recompile_limit, most)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, most)
    for block in blocks:
        block.compile(dynamic=False)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled blocks uncompiled: for inputs of many shapes, each of which would be compiled again."""
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of a step's random draws on a rank, below 2^63: neighbours give unrelated generators."""
    key = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)

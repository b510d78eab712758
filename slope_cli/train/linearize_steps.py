"""The steps of a run that linearizes: attention transfer, where every layer's maps learn from that layer's own loss
alone, and distillation, where adapters learn from what the softmax model predicts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slope_cli.linearize.swap import linear_windows
from slope_cli.linearize.transfer import transfer_losses
from slope_cli.models.loss import Batch, Loss, forward, kl_divergence, loss_fn
from slope_cli.train.step import NOTHING, Around, MaskUpdate, NonFinite, Step, StepOutput, compile_blocks

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TransferStep(Step):
    """Takes the steps of attention transfer.

    The layers' losses share no gradient, so one optimizer over all maps acts as one per layer, as long as each layer's
    gradient is clipped by itself: a layer with a large loss must not slow the others down. The learning rate follows
    the run's schedule and the last state is kept; LoLCATs' code keeps the state with the best validation instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        *,
        mse_weight: float,
        entropy_weight: float,
        compiled: bool = False,
        **others: Any,
    ) -> None:
        """
        Args:
            mse_weight, entropy_weight: see `transfer_losses`.
            compiled: compile each layer's loss, and each transformer block before and after it.
            others: as `Step`'s; clip is the largest norm of each layer's gradient.
        """
        super().__init__(model, optimizer, compiled=compiled, **others)
        self.mse_weight, self.entropy_weight, self.compiled = mse_weight, entropy_weight, compiled

    def __call__(
        self,
        batches: Sequence[Batch],
        mask_update: MaskUpdate | None = None,
        around: Around = NOTHING,
    ) -> StepOutput:
        """Take one step.

        Args:
            batches: a micro-batch each, tensors on the model's device; labels are ignored.
            mask_update: ignored; no mask changes here.
            around: as in `Step`.

        Raises:
            NonFinite: a layer's loss or gradient is not finite; names the layer. Nothing was updated.
        """
        sums: Any = 0
        for batch in batches:
            sums = sums + self._backward(batch, 1 / len(batches))
        layers = linear_windows(self.model)
        self.average_gradients()
        sums = self.group.mean_(sums)
        norms_L = torch.stack([_norm(linear) for linear in layers.values()])
        # The only time that the host waits in a step.
        table = torch.cat([sums, norms_L[None].to(sums)]).tolist()
        for name, *values in zip(layers, *table, strict=True):
            if not all(map(math.isfinite, values)):
                self.optimizer.zero_grad(set_to_none=True)
                text = f"the loss or gradient of {name} is not finite; nothing was updated"
                raise NonFinite("loss or gradient", text)
        with around:
            if self.clip:
                for linear, norm in zip(layers.values(), norms_L, strict=True):
                    torch.nn.utils.clip_grads_with_norm_(linear.parameters(), self.clip, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        totals, errors, norms = table
        by_layer = dict(zip(layers, errors, strict=True))
        return StepOutput(sum(errors) / len(layers), sum(totals) / len(layers), math.hypot(*norms), by_layer)

    def _backward(self, batch: Batch, scale: float) -> Tensor:
        """Add one micro-batch's gradients; returns its share of (total, mse) of each layer, (2, layers)."""
        inputs = {key: batch[key] for key in INPUTS if key in batch}
        with self.autocast():
            losses = transfer_losses(
                self.model,
                inputs,
                mse_weight=self.mse_weight,
                entropy_weight=self.entropy_weight,
                scale=scale,
                compiled=self.compiled,
            )
        return scale * torch.stack([torch.stack([loss.total, loss.mse]) for loss in losses.values()], dim=1)


class DistillStep(Step):
    """Takes steps that learn from a teacher: (1 - share) · cross-entropy + share · KL(teacher || student)."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        *,
        teacher: PreTrainedModel,
        share: float,
        compiled: bool = False,
        **others: Any,
    ) -> None:
        """
        Args:
            teacher: a model of the same vocabulary, in evaluation mode.
            share: between 0 and 1.
            compiled, others: as `Step`'s.
        """
        super().__init__(model, optimizer, compiled=compiled, **others)
        self.teacher, self.share, self.kl_divergence = teacher, share, kl_divergence
        if compiled:
            self.kl_divergence = torch.compile(kl_divergence, dynamic=False)
            compile_blocks(teacher)

    def loss(self, batch: Batch) -> tuple[Loss, Tensor]:
        """The pretraining loss of one micro-batch, and the mixed loss to optimise."""
        with torch.no_grad():
            teacher_BTV = forward(self.teacher, batch).logits
        output = forward(self.model, batch)
        loss = loss_fn(output, batch, self.cross_entropy)
        kl = self.kl_divergence(output.logits, teacher_BTV, batch["labels"])
        return loss, (1 - self.share) * loss.token_loss + self.share * kl


def _norm(linear: torch.nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in linear.parameters() if p.grad is not None])

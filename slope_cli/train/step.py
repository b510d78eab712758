"""One optimizer step: forward and backward over its micro-batches, the check, clipping, the update.

Run eagerly, with the model's blocks compiled, or replayed from CUDA graphs; dense and sparse models alike, so that they
compare fairly. A step with a non-finite loss or gradient raises before anything is updated.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slope_cli.errors import SlopeError
from slope_cli.methods import optim
from slope_cli.models import shapes
from slope_cli.models.loss import CrossEntropy, Loss, batch_loss, token_cross_entropy
from sparse_kernels import backends, prepare, refresh, renew_masks
from sparse_kernels.layers import masks_written

Batch = Mapping[str, "Tensor"]

WARM_UP = 3
"""Forward and backward passes before a capture: libraries make their handles and choose their algorithms in them."""


class Taken(NamedTuple):
    """What a step had before its update: means over its micro-batches, and the norm of the gradient before clipping.

    loss: the cross-entropy in nats of the predicted tokens, as in validation. total: what was optimised, which for BERT
    has the next-sentence loss in it too.
    """

    loss: float
    total: float
    norm: float


class Renewal(NamedTuple):
    """That the masks which may change while training are chosen anew after a step's update.

    columns, seed: of sparse layers' W^{R,C}; see sparse_kernels.renew_masks.
    """

    columns: str = "magnitude"
    seed: int = 0


class Step:
    """Takes the steps of one model and optimizer. Make a new one when parameters join."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: shapes.Objective,
        *,
        dtype: torch.dtype | None,
        clip: float,
        compiled: bool = False,
        graphed: bool = False,
    ) -> None:
        """
        Args:
            dtype: of autocast's products, or None for none.
            clip: largest norm of the gradient, 0 for no clipping.
            compiled: compile each transformer block and the loss.
            graphed: replay from CUDA graphs, captured at the first call; all calls must then have batches of one shape.
        """
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.dtype, self.clip, self.graphed = dtype, clip, graphed
        self.cross_entropy: CrossEntropy = token_cross_entropy
        if compiled:
            self.cross_entropy = torch.compile(token_cross_entropy, dynamic=False)
            compile_blocks(model)
        self._graphs: _Graphs | None = None

    def __call__(self, batches: Sequence[Batch], renewal: Renewal | None = None) -> Taken:
        """Take one step.

        Args:
            batches: a micro-batch each, tensors on the model's device.
            renewal: of the masks, after the update, if there is to be one.

        Raises:
            SlopeError: loss or gradient is not finite; names the layer. Nothing was updated.
        """
        if self.graphed:
            if self._graphs is None:
                with self._same_draws():
                    self._graphs = _Graphs(self, batches)
            losses, norm = self._graphs.gradients(batches)
        else:
            losses = sum(self.backward(batch, len(batches)) for batch in batches)  # type: ignore[assignment]
            norm = self.norm()
        taken = self._check(losses, norm, batches)
        if self._graphs is not None:
            self._graphs.update(renewal)
        else:
            self.update(norm)
            self.optimizer.zero_grad(set_to_none=True)
            if renewal:
                self.renew(renewal)
        return taken

    def renew(self, renewal: Renewal) -> None:
        """Choose the masks anew, without a graph."""
        renew_masks(self.model, columns=renewal.columns, seed=renewal.seed)

    def _same_draws(self) -> contextlib.AbstractContextManager[Any]:
        """Within it nothing is drawn from the generators, to those after it: a resumed run captures its graphs in
        another step than the run that it repeats."""
        device = next(self.model.parameters()).device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def loss(self, batch: Batch) -> Loss:
        """What is optimised of one micro-batch, and its cross-entropy."""
        return batch_loss(self.model, batch, self.objective, self.cross_entropy)

    def backward(self, batch: Batch, count: int) -> Tensor:
        """Add the gradient of one of `count` micro-batches; its share of (loss, total), detached, on the device."""
        with self.autocast():
            loss = self.loss(batch)
            total = loss.total / count
        torch.autograd.backward(total)
        return torch.stack([loss.token_loss / count, total.detach()])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as in a step."""
        # A graph must hold the casts of the weights, not find them made before.
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype is not None, cache_enabled=not self.graphed)

    def norm(self) -> Tensor:
        """The norm of the whole gradient, on the device."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._trained() if p.grad is not None])

    def update(self, norm: Tensor) -> None:
        """Clip by the gradient's `norm` and update; without waiting for the device."""
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self._trained(), self.clip, norm)
        self.optimizer.step()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.grad is not None]

    def _check(self, losses: Tensor, norm: Tensor, batches: Sequence[Batch]) -> Taken:
        # The one time that the host waits in a step: the update runs while it makes the next batch.
        taken = Taken(*torch.cat([losses.float(), norm.float().reshape(1)]).tolist())
        if not math.isfinite(taken.total):
            raise SlopeError(self._blame_forward(batches))
        if not math.isfinite(taken.norm):
            raise SlopeError(self._blame_gradient())
        return taken

    def _blame_forward(self, batches: Sequence[Batch]) -> str:
        """Run the forward pass again and name the first layer whose output is not finite."""
        bad: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, inputs: object, output: object) -> None:
                if isinstance(output, torch.Tensor) and not output.isfinite().all():
                    bad.append(name)

            return hook

        handles = [m.register_forward_hook(watch(name)) for name, m in self.model.named_modules() if name]
        with torch.no_grad(), self.autocast(), eager():
            for batch in batches:
                batch_loss(self.model, batch, self.objective)
        for handle in handles:
            handle.remove()
        where = f"first in the output of {bad[0]}" if bad else "in the loss itself"
        return f"the loss is not finite, {where}; nothing was updated"

    def _blame_gradient(self) -> str:
        """Name the layer nearest to the loss whose gradient is not finite."""
        named = self.model.named_parameters()
        bad = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        where = bad[-1] if bad else "the norm alone"
        return f"the gradient of {where} is not finite ({len(bad)} in all); nothing was updated"


class _Graphs:
    """A step in CUDA graphs: the first micro-batch, a further one, the norm, the update; then the sparse layers' copies
    from the new weights, or the renewal of the masks, which brings them along.

    The first writes the gradients, the further ones add to them, so none has to be cleared. The host looks at loss and
    norm between the norm's graph and the update's.
    """

    def __init__(self, step: Step, batches: Sequence[Batch]) -> None:
        self._step = step
        self._batch = {name: tensor.clone() for name, tensor in batches[0].items()}
        count = len(batches)
        capturable = optim.make_capturable(step.optimizer)
        prepare(step.model, self._batch["input_ids"].numel(), step.dtype or torch.float32)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step.backward(self._batch, count)
            step.norm()
            step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        refresh(step.model)  # what one launch for all layers reads is made here, which a capture cannot
        self._stream, self._pool = stream, torch.cuda.graph_pool_handle()
        self._first, self._first_losses = self._capture(lambda: step.backward(self._batch, count))
        if count > 1:
            self._further, self._further_losses = self._capture(lambda: step.backward(self._batch, count))
        self._norm, self._norm_value = self._capture(step.norm)
        self._update: Callable[[], None] = functools.partial(step.update, self._norm_value)
        if capturable:
            self._update = self._capture(self._update)[0].replay
        self._refresh: torch.cuda.CUDAGraph | None = None
        if backends(step.model):
            self._refresh, _ = self._capture(lambda: refresh(step.model))
        self._renewal: torch.cuda.CUDAGraph | None = None

    def _capture(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph, result

    def gradients(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Losses and norm of a step's micro-batches; their gradient is left for `update`."""

        for number, batch in enumerate(batches):
            for name, tensor in batch.items():
                self._batch[name].copy_(tensor, non_blocking=True)
            if number == 0:
                self._first.replay()
                losses = self._first_losses.clone()  # the graph writes over its own
            else:
                self._further.replay()
                losses += self._further_losses
        self._norm.replay()
        return losses, self._norm_value

    def update(self, renewal: Renewal | None) -> None:
        """Update by the gradient of `gradients`; then the masks, if they are to be renewed, and the copies."""
        self._update()
        if renewal is None:
            if self._refresh is not None:
                self._refresh.replay()
        elif renewal.columns == "random":  # another seed each time
            self._step.renew(renewal)
        elif self._renewal is None:  # made in the first one, which makes what a capture cannot
            self._step.renew(renewal)
            self._renewal, _ = self._capture(functools.partial(self._step.renew, renewal))
        else:
            self._renewal.replay()
            masks_written(self._step.model)


def compile_blocks(model: nn.Module) -> None:
    """Compile each transformer block, the entries of the model's first module list, for batches of one shape."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in next(lists, ()):
        block.compile(dynamic=False)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Where compiled blocks run uncompiled: for inputs of many shapes, which would each be compiled anew."""
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance

"""A step replayed from CUDA graphs: the host launches a handful of graphs in place of thousands of kernels."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slope_cli.methods import optim
from slope_cli.models.loss import Batch
from slope_cli.train.step import NOTHING, Around, MaskUpdate, Step, StepOutput
from sparse_kernels import backends, mask_buffers, prepare, refresh
from sparse_kernels.driver import capture_stream

WARM_UP = 3
"""Forward and backward passes before a capture: libraries create handles and choose algorithms in them."""


class GraphedStep:
    """Takes the steps of a Step from graphs, captured at the first call; all calls have batches of one shape."""

    def __init__(self, step: Step) -> None:
        self.step = step
        step.cache_casts = False  # the graphs must contain the casts of the weights
        self._graphs: _Graphs | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of autocast's products, or None for none."""
        return self.step.dtype

    def __call__(
        self,
        batches: Sequence[Batch],
        mask_update: MaskUpdate | None = None,
        around: Around = NOTHING,
    ) -> StepOutput:
        """Take one step; as `Step`."""
        if self._graphs is None:
            # A resumed run captures at another step than the original run, and must draw the same numbers afterwards.
            with torch.random.fork_rng(devices=[self.step.model.device]):
                self._graphs = _Graphs(self.step, batches)
        losses, norm = self._graphs.gradients(batches)
        output = self.step.check(losses, norm, batches)
        gradients = self.step.dense_gradients(batches) if mask_update and mask_update.row_share else {}
        with around:
            self._graphs.update(mask_update, gradients)
        return output

    def autocast(self) -> Any:
        """Autocast as in a step."""
        return self.step.autocast()


class _Graphs:
    """Graphs of the first micro-batch, a further one, the norm, and the update; then of the refresh of packed weights,
    or of the mask update, which includes it.

    The first writes the gradients, the further ones add to them, so none has to be cleared. The host reads loss and
    norm between the norm's graph and the update's.
    """

    def __init__(self, step: Step, batches: Sequence[Batch]) -> None:
        self._step = step
        self._batch = {name: tensor.clone() for name, tensor in batches[0].items()}
        self._targets, count = step.targets(batches), len(batches)
        capturable = optim.make_capturable(step.optimizer)
        prepare(step.model, self._batch["input_ids"].numel(), step.dtype or torch.float32)
        backward = functools.partial(step.backward, self._batch, count, self._targets)
        stream = capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                backward()
            step.norm()
            step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        refresh(step.model)  # allocates the argument table of the launch for all layers, which a capture cannot
        self._stream, self._pool = stream, torch.cuda.graph_pool_handle()
        self._first, self._first_losses = self._capture(backward)
        if count > 1:
            self._further, self._further_losses = self._capture(backward)
        self._norm, self._norm_value = self._capture(step.norm)
        self._update: Callable[[], None] = functools.partial(step.update, self._norm_value)
        if capturable:
            self._update = self._capture(self._update)[0].replay
        self._refresh: torch.cuda.CUDAGraph | None = None
        if backends(step.model):
            self._refresh, _ = self._capture(lambda: refresh(step.model))
        self._mask_update: torch.cuda.CUDAGraph | None = None

    def _capture(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph, result

    def gradients(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Losses and norm of a step's micro-batches; their gradient is left for `update`."""
        if self._targets is not None and (targets := self._step.targets(batches)) is not None:
            self._targets.copy_(targets)
        for number, batch in enumerate(batches):
            for name, tensor in batch.items():
                self._batch[name].copy_(tensor, non_blocking=True)
            if number == 0:
                self._first.replay()
                losses = self._first_losses.clone()  # the graph writes over its own
            else:
                self._further.replay()
                losses += self._further_losses
        self._step.average_gradients()  # between two graphs: none contains a collective
        self._norm.replay()
        return losses, self._norm_value

    def update(self, mask_update: MaskUpdate | None, dense_gradients: Mapping[str, Tensor]) -> None:
        """Update by the gradient of `gradients`; then the masks, if `mask_update` is given, and the packed weights.

        dense_gradients: as `Step.update_masks` takes them.
        """
        self._update()
        if mask_update is None:
            if self._refresh is not None:
                self._refresh.replay()
        elif mask_update.row_share or mask_update.backward == "random":  # other metadata, or another seed each time
            self._step.update_masks(mask_update, dense_gradients)
        elif self._mask_update is None:  # the first one runs eagerly: it allocates what a capture cannot
            self._step.update_masks(mask_update)
            self._mask_update, _ = self._capture(functools.partial(self._step.update_masks, mask_update))
        else:
            self._mask_update.replay()
            torch.autograd.graph.increment_version(mask_buffers(self._step.model))  # a replay does not count

"""Phases: what a run trains in each of its steps, as data.

A method is a list of phases, a function of the configuration alone. So a checkpoint need not say in which phase it was
saved, and loop, resume, dry run, accounting and learning rates all look at the same list.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

WEIGHTS, MATRICES, ADAPTERS, MAPS = "weights", "matrices", "adapters", "maps"
"""The groups of parameters, each with a learning rate of its own: the model's own, those of them that Muon updates,
low-rank adapters (and the gates of linear attention, which are trained with them), feature maps."""


@dataclass(frozen=True)
class Layers:
    """What the linear layers are.

    kind: dense; masked, dense weights under a mask; unmasked, such layers without it; sparse.
    mask_update_interval: steps between mask updates; 0: never.
    row_mask_update_interval, row_mask_share: of sparse layers; see `Phase.row_mask_share`.
    backward_mask: how that of W^{R,C} is chosen, magnitude or random.
    rescale, backward_rescale: of sparse layers; see `sparse_kernels.sparsify`.
    transposable, mvue, straight_through, soft_threshold: of masked layers; see `sparse_kernels.mask_layers`.
    decay: of pruned weights; see `sparse_kernels.decay_pruned`.
    """

    kind: Literal["dense", "masked", "unmasked", "sparse"] = "dense"
    mask_update_interval: int = 0
    row_mask_update_interval: int = 0
    row_mask_share: float = 0.0
    backward_mask: str = "magnitude"
    rescale: bool = False
    backward_rescale: bool = False
    transposable: bool = False
    mvue: bool = False
    straight_through: bool = True
    soft_threshold: bool = False
    decay: float = 0.0

    @property
    def backward_mask_is_derived(self) -> bool:
        """Whether W^{R,C}'s mask follows from values and row mask after each step, so that it need not be saved."""
        return self.kind == "sparse" and self.mask_update_interval == 1 and self.backward_mask == "magnitude"

    @property
    def sparse_products(self) -> list[str]:
        """Which of the three products of a pruned layer have an operand that is N:M along what is summed over."""
        sparse, pruned = self.kind == "sparse", self.kind in ("masked", "sparse")
        products = {
            "forward": pruned,
            "input gradient": sparse or (pruned and self.transposable),
            "weight gradient": pruned and self.mvue,
        }
        return [name for name, holds in products.items() if holds]


DENSE = Layers()


@dataclass(frozen=True)
class Rate:
    """The learning rate of a group from step `first` to the one before `last`: warm-up, then the run's schedule.

    warmup: a share of these steps if below 1, else a number of steps.
    """

    first: int
    last: int
    peak: float
    warmup: float


StepKind = Literal["train", "distill", "transfer"]


@dataclass(frozen=True)
class Phase:
    """What is trained, and how, from step `first` (counted from 0) until the next phase begins.

    linearized: attention is window softmax plus linear attention.
    fp8: the products of linear layers have fp8 operands in training.
    row_masks_end: the steps after which the row masks of sparse layers are fixed; 0: they always are.
    softmax_units: so many of the linearized layers, or of their KV heads, have softmax attention again; which ones is
        chosen when it begins.
    adapters: low-rank adapters were added; to a linearized model beside those that it had.
    step: train, by the loss; distill, by a teacher's predictions too; transfer, each layer by its own loss.
    rates: the trained groups and their learning rates; that of the first is logged.
    """

    first: int
    layers: Layers = DENSE
    row_masks_end: int = 0
    linearized: bool = False
    softmax_units: int = 0
    adapters: bool = False
    fp8: bool = False
    step: StepKind = "train"
    rates: Mapping[str, Rate] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A short description for the log."""
        what: list[str] = [self.step if self.linearized else self.layers.kind]
        what += ["all weights"] * (self.linearized and WEIGHTS in self.rates)
        what += ["with adapters"] * self.adapters + ["in fp8"] * self.fp8
        what += ["from a teacher"] * (self.step == "distill" and not self.linearized)
        return ", ".join(what)

    @property
    def shares_teacher(self) -> bool:
        """Whether a teacher has the tensors that the model has frozen, as that of one whose adapters are trained."""
        return self.linearized and WEIGHTS not in self.rates

    def updates_masks(self, step: int) -> bool:
        """Whether masks are chosen again at the end of a step, counted from 0; backward masks follow row masks."""
        interval = self.layers.mask_update_interval
        return (interval > 0 and (step + 1) % interval == 0) or self.row_mask_share(step) > 0

    def row_mask_share(self, step: int) -> float:
        """The share of each row's kept entries that row masks may replace at the end of a step, counted from 0.

        RigL's (arXiv 1911.11134): it falls to 0 by half a cosine from the run's beginning to `row_masks_end`.
        """
        interval, done = self.layers.row_mask_update_interval, step + 1
        if not interval or done % interval or done >= self.row_masks_end:
            return 0.0
        return self.layers.row_mask_share * 0.5 * (1 + math.cos(math.pi * done / self.row_masks_end))


class Phases(tuple[Phase, ...]):
    """The phases of a run in order; the first begins at step 0. Of several that begin at one step, the last wins."""

    def at(self, step: int) -> Phase:
        """The phase of a step, counted from 0."""
        return next(phase for phase in reversed(self) if phase.first <= step)

    @property
    def distinct(self) -> list[Phase]:
        """Those that last for a step at least, in order."""
        return [phase for phase in self if self.at(phase.first) is phase]

    @property
    def end(self) -> Phase:
        """The phase that a run ends in."""
        return self[-1]

    @property
    def dense(self) -> bool:
        """Whether the linear layers stay what they are in every phase."""
        return all(phase.layers == DENSE for phase in self)

    @property
    def adapter_step(self) -> int | None:
        """The first step with adapters, counted from 0; None if there are never any."""
        return next((phase.first for phase in self if phase.adapters), None)

    @property
    def decay(self) -> float:
        """Of pruned weights, in the phases that have masked layers."""
        return max(phase.layers.decay for phase in self)

"""The sections of the configuration that one method alone reads, each named after its method."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slope_cli.config.section import Section, setting, switch

if TYPE_CHECKING:
    from slope_cli.config.schema import Config

FEATURE_MAPS = ("hedgehog", "t2r")


@dataclass(kw_only=True)
class SlopeConfig(Section, section="slope"):
    """method=slope: double-pruned layers (SLoPe, arXiv 2405.16325)."""

    before: str = setting("dense", "dense", "sr_ste")
    """What the layers are until sparsity.start: dense, or sr_ste, dense weights under a mask that follows them."""
    rescale: bool = switch(False)
    """When a layer becomes sparse, scale its kept weights up to the sum of squares that all of its weights had."""
    mask_update_interval: int = setting(1, unit="steps", example="100")
    """How often the backward mask is chosen anew, in optimizer steps: 1 is after every step, 100 after every hundredth,
    as in the SLoPe paper, 0 never. It prunes the sparse weights a second time, W^R to W^{R,C}, for the product that
    computes the gradient of a layer's input, and so must follow them while they train. For the mask of the forward
    product see slope.row_mask_until."""
    row_mask_until: float = setting(0.0, unit="a share of the run", example="0.25")
    """Until when the row mask, that of the forward product, follows the gradient, as a share of the run: 0 is never.
    An update looks at each group, 4 weights for 2:4: the kept weight of the smallest magnitude gives its place to the
    pruned one of the largest gradient, if this is larger than its own. What joins begins at 0."""
    row_mask_share: float = setting(0.3, unit="a share of the kept weights", example="0.1")
    """How many of a row's kept weights an update of the row mask replaces, at most: those where it gains most in
    gradient. This share is that of the run's beginning, and falls to 0 by half a cosine until slope.row_mask_until."""
    row_mask_update_interval: int = setting(100, unit="steps", example="500")
    """How often the row mask is updated until slope.row_mask_until, in optimizer steps: 100 is after every hundredth.
    Such a step takes its forward and backward pass twice, and memory for the gradient of all weights, pruned ones
    included."""
    backward_mask: str = setting("magnitude", "magnitude", "random")
    """How the backward mask (see slope.mask_update_interval) is chosen: magnitude, the largest weights, or random,
    other ones at each update."""
    backward_rescale: bool = switch(False)
    """Scale the gradient of a layer's input by the norm of W^R divided by the norm of W^{R,C}: the backward mask takes
    some of it away."""
    decay: float = setting(6e-6, unit="a factor", example="2e-4")
    """With slope.before=sr_ste, until sparsity.start: pruned weights decay; this times such a weight is added to its
    gradient."""

    def _check_values(self) -> None:
        self._not_negative("mask_update_interval", "decay")
        self._positive("row_mask_update_interval")
        self._share("row_mask_until", "row_mask_share")

    def check(self, config: Config) -> None:
        start, rule = config.sparsity.start, f"must be above sparsity.start={config.sparsity.start:g}, or 0"
        self._need(self.row_mask_until == 0 or self.row_mask_until > start, "row_mask_until", rule)

    def unused(self, config: Config) -> dict[str, str]:
        rows = () if self.row_mask_until else ("row_mask_update_interval", "row_mask_share")
        unused = dict.fromkeys(rows, "slope.row_mask_until=0")
        if not config.sparsity.start:
            return unused | dict.fromkeys(("before", "decay"), "sparsity.start=0")
        return unused if self.before == "sr_ste" else unused | {"decay": "slope.before=dense"}


@dataclass(kw_only=True)
class SrSteConfig(Section, section="sr_ste"):
    """method=sr_ste: dense weights under a mask that follows them (arXiv 2102.04010)."""

    mask_update_interval: int = setting(1, unit="steps", example="100")
    """How often the masks are chosen anew, in optimizer steps: 1 is after every step, 100 after every hundredth, 0
    never."""
    decay: float = setting(6e-6, unit="a factor", example="2e-4")
    """Pruned weights decay: this times such a weight is added to its gradient."""

    def _check_values(self) -> None:
        self._not_negative("mask_update_interval", "decay")


@dataclass(kw_only=True)
class FstConfig(Section, section="fst"):
    """method=fst: transposable masks, unbiased pruning of the output's gradient, a dense end (arXiv 2404.01847)."""

    mask_update_interval: int = setting(40, unit="steps", example="100")
    """How often the masks are chosen anew, in optimizer steps: 40 is after every fortieth, 1 after every step, 0
    never."""
    decay: float = setting(6e-6, unit="a factor", example="2e-4")
    """Pruned weights decay: this times such a weight is added to its gradient."""
    dense_finish: float = setting(0.17, unit="a share of the run", example="0.1")
    """How long the layers are dense at the end of the run, as a share of it: 0.17 is the last sixth of the steps."""

    def _check_values(self) -> None:
        self._not_negative("mask_update_interval", "decay")
        self._share("dense_finish")

    def check(self, config: Config) -> None:
        s = config.sparsity
        rule = "fst searches transposable masks up to 4: sparsity.m=4, no sparsity.pattern_overrides"
        s._need(s.m <= 4 and not s.pattern_overrides, "m", rule)


@dataclass(kw_only=True)
class SSteConfig(Section, section="s_ste"):
    """method=s_ste: dense weights that soft thresholding makes N:M in every product (S-STE, arXiv 2409.09099)."""

    mvue: bool = switch(True)
    """Prune the gradient of a layer's output N:M along the tokens, at random and without bias, for the gradient of its
    weight, as the paper does to make this product sparse, too; false takes the exact gradient."""

    def check(self, config: Config) -> None:
        s = config.sparsity
        s._need(s.mask == "magnitude", "mask", "soft thresholding keeps the largest magnitudes; choose magnitude")


_KV_HEAD = r"(0|[1-9]\d{0,8})/(0|[1-9]\d{0,8})"


def layer_and_head(entry: int | str) -> tuple[int, int | None]:
    """What an entry of linearize.keep_softmax names: a layer, 3, or a KV head of one, "3/1"; None for all heads."""
    layer, _, head = str(entry).partition("/")
    return int(layer), int(head) if head else None


SINKS = 4
"""The entries of an exact cache that a sequence's first tokens have for good."""


@dataclass(kw_only=True)
class LinearizeConfig(Section, section="linearize"):
    """method=linearize: softmax attention becomes window softmax plus linear attention (LoLCATs, arXiv 2410.10254)."""

    window: int = setting(64, unit="tokens", example="32")
    """Tokens that softmax attention sees, including the token itself; the linear branch sees the earlier ones."""
    kind: str = setting("standard", "standard", "terrace")
    """What the window is: standard, the last linearize.window tokens; terrace, a token's own block of so many tokens,
    and the whole one before."""
    cache: int = setting(0, unit="entries of a KV head", example="64")
    """How many far tokens keep exact keys and values beside the window: the first ones, and those whose values the
    linear branch predicts worst. Tokens then leave the window by blocks of linearize.window. 0 for none."""
    state: str = setting("additive", "additive", "gated", "delta")
    """What a far token does to the state of the linear branch: additive, it adds to it; gated, it first decays what is
    there, by a factor of its key and its KV head that is 1 at first and is trained with the adapters; delta, it also
    replaces a share of what the state says of its key by its value (the gated delta rule)."""
    feature_map: str = setting("hedgehog", *FEATURE_MAPS)
    """The feature map of the linear branch: hedgehog, phi(x) = [softmax(xW), softmax(-xW)], or t2r,
    phi(x) = relu(xW + b)."""
    features: int | None = setting(None, unit="features of a head", example="128")
    """How many features a head has, the columns of its W; null for as many as it has dimensions, and in hedgehog 32 at
    least."""
    mix: float = setting(0.1, unit="a share, above 0 and below 1", example="0.5")
    """The weight of the window against the linear branch at the start; training changes it."""
    keep_softmax: Any = setting([], unit="layers, or LAYER/HEAD", example="auto:2")
    """What keeps softmax attention: layers by their numbers from 0, and KV heads of layers as 3/1, head 1 of layer 3;
    or auto:K for K layers, heads:K for K KV heads of any layers, that are chosen after the transfer and a fifth of the
    steps after it: those that bring the predictions nearest to the softmax model's where these need recall."""
    transfer: float = setting(0.5, unit="a share of the run", example="0.6")
    """How long the run is attention transfer, in which each layer learns the output of its own softmax attention, as a
    share of the run; the rest trains the adapters. 1 is transfer alone."""
    transfer_lr: float = setting(1e-2, unit="a factor, times the update", example="1e-3")
    """The learning rate of feature maps and mix factors in the transfer, at its peak."""
    layers_at_once: int = setting(0, unit="layers", example="8")
    """How many layers' weights the device holds at once in the transfer, which goes from one range of so many layers to
    the next, each for all of its steps; the hidden states between two ranges are kept on the disk. For models larger
    than the device's memory, on one device. 0 for all layers."""
    scratch: str | None = setting(None, example="/scratch/states")
    """A folder for the hidden states of linearize.layers_at_once, which a resumed run finds again; null for the run's
    own."""
    adjust_maps: bool = switch(False)
    """Keep training feature maps and mix factors along with the adapters, at the adapters' learning rate."""
    mse_weight: float = setting(1000.0, unit="a factor", example="1")
    """Weight, in the transfer's loss, of the squared error of a layer's output."""
    entropy_weight: float = setting(0.0, unit="a factor", example="1")
    """Weight, in the transfer's loss, of the cross-entropy of a layer's attention weights."""
    window_dropout: float = setting(0.0, unit="a probability", example="0.1")
    """The probability that training drops the window of one head of one sequence, so that the linear branch learns to
    work alone."""
    train: str = setting("adapters", "adapters", "all")
    """What is trained after the transfer: adapters; or all, every weight at optim.lr, feature maps and mix factors, and
    adapters unless adapters.rank=0. A teacher (distill.share) then needs room for weights of its own."""
    targets: list[str] = setting(["q", "k", "v", "o"], example="[q, v]")
    """Which projections of attention get adapters: some of q, k, v, o."""

    @property
    def listed(self) -> list[int | str]:
        """What keeps softmax attention from the first step on, as in keep_softmax."""
        return self.keep_softmax if isinstance(self.keep_softmax, list) else []

    @property
    def kept(self) -> list[int]:
        """The layers among these."""
        return [entry for entry in self.listed if isinstance(entry, int)]

    @property
    def chosen(self) -> int:
        """The number of layers, or of KV heads, that are chosen after the transfer to have softmax attention again."""
        return 0 if isinstance(self.keep_softmax, list) else int(self.keep_softmax.partition(":")[2])

    @property
    def by_heads(self) -> bool:
        """Whether KV heads are chosen, and not layers."""
        return not isinstance(self.keep_softmax, list) and self.keep_softmax.startswith("heads:")

    @property
    def gated(self) -> bool:
        """Whether the state decays by gates, which are trained with the adapters."""
        return self.state != "additive"

    @property
    def every(self) -> bool:
        """Whether all weights are trained after the transfer."""
        return self.train == "all" and self.transfer < 1

    def _check_values(self) -> None:
        kept = self.keep_softmax
        if isinstance(kept, list):
            whole = [entry for entry in kept if type(entry) is int and entry >= 0]
            heads = [entry for entry in kept if isinstance(entry, str) and re.fullmatch(_KV_HEAD, entry, re.ASCII)]
            known = len({*whole, *heads}) == len(kept) == len(whole) + len(heads)
            known &= not {layer_and_head(entry)[0] for entry in heads} & {*whole}
        else:
            known = re.fullmatch(r"(auto|heads):[1-9]\d{0,8}", str(kept), re.ASCII) is not None
        rule = "list different layers, from 0, as [0, 3], and KV heads of others, as 1/2; or write auto:K or heads:K"
        self._need(known, "keep_softmax", rule)
        self._positive("window", "transfer_lr", "mse_weight")
        self._need(self.cache == 0 or self.cache >= SINKS, "cache", f"must be 0, or {SINKS} or more: the first tokens")
        rule = "the exact cache ranks tokens by an additive state; set linearize.cache=0"
        self._need(not (self.cache and self.gated), "state", rule)
        if self.state == "delta":
            rule = "by the delta rule tokens join the state one at a time; set linearize.kind=standard"
            self._need(self.kind == "standard", "state", rule)
            rule = "a state of the delta rule gives tokens no weights to compare; set it to 0"
            self._need(self.entropy_weight == 0, "entropy_weight", rule)
        if self.features is not None:
            self._positive("features")
        self._need(0 < self.mix < 1, "mix", "must be above 0 and below 1")
        self._share("transfer", "window_dropout")
        self._not_negative("entropy_weight", "layers_at_once")
        known = bool(self.targets) and set(self.targets) <= {"q", "k", "v", "o"}
        self._need(known, "targets", "choose some of q, k, v, o; for no adapters set adapters.rank=0")

    def check(self, config: Config) -> None:
        length, terrace = config.train.seq_len, self.kind == "terrace"
        limit = f"{'half of ' * terrace}train.seq_len={length}"
        rule = f"must be below {limit}, or the linear branch has nothing to learn"
        self._need(self.window * (1 + terrace) < length, "window", rule)
        far = (length - 1) // self.window * self.window - self.window + (not terrace)  # before the last block
        rule = f"must be below the {far} tokens that leave the windows within train.seq_len={length}"
        self._need(self.cache == 0 or self.cache < far, "cache", f"{rule}, or the linear branch has nothing to learn")
        after = self.transfer < 1 and (self.every or config.adapters.rank > 0)
        rule = "its gates are trained with the adapters; set linearize.transfer below 1, and adapters.rank"
        self._need(after or self.state != "gated", "state", rule)
        between = 0 < config.train.step_at(self.transfer) < config.train.steps - 1 and after
        rule = "chooses after the transfer and some steps of the adapters; set linearize.transfer above 0 and below 1"
        rule += ", and adapters.rank"
        self._need(between or not self.chosen, "keep_softmax", rule)
        rule = "method=linearize runs without CUDA graphs"
        config.train._need(config.train.cuda_graph is not True, "cuda_graph", rule)
        config.train.cuda_graph = False

    def unused(self, config: Config) -> dict[str, str]:
        delta = ("feature_map", "features", "mix") if self.state == "delta" else ()
        found = dict.fromkeys(delta, "linearize.state=delta")
        if self.transfer == 0:
            idle = ("transfer_lr", "mse_weight", "entropy_weight", "layers_at_once", "scratch")
            return found | dict.fromkeys(idle, "linearize.transfer=0")
        found |= {} if self.layers_at_once else {"scratch": "linearize.layers_at_once=0"}
        if self.transfer == 1:
            return found | dict.fromkeys(("train", "targets", "adjust_maps"), "linearize.transfer=1")
        found |= {"adjust_maps": "linearize.train=all"} if self.every else {}
        return found if config.adapters.rank else found | {"targets": "adapters.rank=0"}

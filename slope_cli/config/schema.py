"""The configuration of a run: defaults here, then a recipe's YAML, then KEY=VALUE words of the command line.

Everything is strict: an unknown key, a wrong type or a value out of range is a UsageError that says what to set.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slope_cli.errors import UsageError
from slope_cli.linearize.settings import MAPS, LinearizeSettings

# Keys that may change between two starts of one run: they do not touch what is computed.
FREE_KEYS = ("log", "train.device", "data.path", "data.verify")

METHODS = ("slope", "dense", "sr_ste", "fst", "wanda", "linearize")
INIT = "init"
"""The model.name that stands for the shape of model.init."""
EMBEDDED = "embedded"
MAX_SEED = 2**63 - 1
"""The largest seed that torch's generators take."""


def _need(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise UsageError(f"{key}={value}: {rule}")


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    _need(value in choices, key, value, f"choose one of {', '.join(choices)}")


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _need(math.isfinite(value) and value > 0, f"{section}.{name}", value, "must be positive")


def _not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _need(math.isfinite(value) and value >= 0, f"{section}.{name}", value, "must be 0 or more")


def _share(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _need(0 <= value <= 1, f"{section}.{name}", value, "must lie between 0 and 1")


@dataclass(kw_only=True)
class ModelConfig:
    name: str = "gpt2-nano"
    """One of the shapes of slope_cli.models; for method=linearize also "init", the shape of model.init."""
    init: str | None = None
    """A run, or a folder of `slope export` or transformers, whose weights this run starts from; null draws them."""
    dropout: float | None = None
    """All of the family's dropout rates at once; null keeps the shape's own."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the transformers config to change, for example {n_layer: 6}."""

    def __post_init__(self) -> None:
        if self.dropout is not None:
            _need(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be at least 0 and below 1")


@dataclass(kw_only=True)
class DataConfig:
    path: str = EMBEDDED
    """A folder made by `slope data prepare`, or "embedded": the public-domain novels inside the package, as bytes."""
    verify: bool = True
    """Hash every token file before training (about 2 GB/s)."""


@dataclass(kw_only=True)
class SparsityConfig:
    n: int = 2
    m: int = 4
    blocks: dict[str, list[int]] = field(default_factory=dict)
    """Other patterns for ranges of blocks: {12-23: [2, 8]} makes the last half of 24 blocks 2:8."""
    mask: str = "magnitude"
    """How slope's W^R is chosen: magnitude of the weights, random, or wanda (magnitude times the inputs' norm)."""
    start: float = 0.0
    """The share of the run after which the layers become sparse."""
    before: str = "dense"
    """What they are until then: dense, or sr_ste (a mask that follows the weights in every step)."""
    rescale: bool = False
    """Scale the kept weights of each layer up to the sum of squares that the dense layer had."""
    renew_every: int | None = None
    """Choose masks anew every so many steps, 0 never: slope's columns of W^{R,C} (null: 1), the whole mask of sr_ste
    (null: 1) and fst (null: 40)."""
    column_mask: str = "magnitude"
    """How the columns of W^{R,C} are chosen: magnitude, or random anew at each renewal."""
    column_rescale: bool = False
    """Scale the input gradient by |W^R| / |W^{R,C}|."""
    decay: float = 6e-6
    """sr_ste and fst: this times the pruned weights is added to their gradient."""
    dense_finish: float = 0.17
    """fst: the share of the run, at its end, that is dense."""
    calibration: int = 32
    """wanda: sequences that the norms of the inputs are taken over."""
    backend: str = "auto"
    """On a GPU: auto takes for each product what measures faster, sparse or dense; cusparselt, dense, reference."""
    skip: list[str] = field(default_factory=list)
    """Regular expressions of layer names that stay dense too."""

    def __post_init__(self) -> None:
        rule = "an N:M pattern needs 0 < sparsity.n < sparsity.m (for 2:4 say sparsity.n=2 sparsity.m=4)"
        _need(0 < self.n < self.m, "sparsity.n", self.n, f"{rule}, and sparsity.m is {self.m}")
        for blocks, nm in self.blocks.items():
            rule = "say for example sparsity.blocks.12-23=[2,8]"
            known = re.fullmatch(r"\d+-\d+", blocks) is not None
            _need(known and len(nm) == 2, f"sparsity.blocks.{blocks}", nm, rule)
            _need(0 < nm[0] < nm[1], f"sparsity.blocks.{blocks}", nm, f"0 < N < M; {rule}")
        _one_of("sparsity.mask", self.mask, ("magnitude", "random", "wanda"))
        _one_of("sparsity.before", self.before, ("dense", "sr_ste"))
        _one_of("sparsity.column_mask", self.column_mask, ("magnitude", "random"))
        _one_of("sparsity.backend", self.backend, ("auto", "cusparselt", "dense", "reference"))
        _share("sparsity", self, "start", "dense_finish")
        _not_negative("sparsity", self, "decay")
        _positive("sparsity", self, "calibration")
        if self.renew_every is not None:
            _not_negative("sparsity", self, "renew_every")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"sparsity.skip: {pattern!r} is no regular expression ({error})") from None


@dataclass(kw_only=True)
class AdapterConfig:
    rank: float = 0.0156
    """A whole number, or a share of each layer's smaller side if below 1; 0 for no adapters."""
    start: float = 0.99
    """The share of the run after which adapters join."""
    init: str = "lora"
    """lora: A uniform, scale 1. gaussian, as in the SLoPe paper's code: A normal, scale 1 / rank. B is 0 in both."""
    alpha: float | None = None
    """The adapter's output is scaled by alpha / rank; null for the scale of its init."""
    lr: float | None = None
    """The adapters' own peak learning rate; null for optim.lr."""
    schedule: str = "own"
    """own: their learning rate goes through the whole schedule in their steps; run: it is the run's in each step,
    times adapters.lr / optim.lr."""
    warmup: float = 0.1
    """Their warm-up: a share of the adapters' steps if below 1, else a number of steps."""
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("adapters", self, "rank", "warmup", "weight_decay")
        whole_or_share = self.rank < 1 or float(self.rank).is_integer()
        _need(whole_or_share, "adapters.rank", self.rank, "must be a whole number or a share below 1")
        _share("adapters", self, "start")
        _one_of("adapters.init", self.init, ("lora", "gaussian"))
        _one_of("adapters.schedule", self.schedule, ("own", "run"))
        for name in ("alpha", "lr"):
            if getattr(self, name) is not None:
                _positive("adapters", self, name)


@dataclass(kw_only=True)
class LinearizeConfig:
    """method=linearize: softmax attention becomes window softmax plus linear attention (LoLCATs)."""

    window: int = 64
    """Tokens near enough for softmax."""
    kind: str = "standard"
    """standard: the last `window` tokens; terrace: a token's own block of `window` tokens and the whole one before."""
    map: str = "hedgehog"
    """The feature map: hedgehog or t2r."""
    features: int | None = None
    """Columns of a head's map; null for as many features in all as the head has dimensions, 32 at least in hedgehog."""
    mix: float = 0.1
    """The window's weight against the linear branch at the start."""
    keep_softmax: list[int] = field(default_factory=list)
    """Layers that keep their softmax attention."""
    transfer: float = 0.5
    """The share of the run that is attention transfer; the rest trains the adapters. 1 for transfer alone."""
    transfer_lr: float = 1e-2
    """Peak learning rate of the maps and mix factors in the transfer."""
    adjust_maps: bool = False
    """Train the maps and mix factors beside the adapters too, at their learning rate; else transfer alone does."""
    mse_weight: float = 1000.0
    """Weight of the squared error of a layer's output."""
    entropy_weight: float = 0.0
    """Weight of the cross-entropy of its attention weights."""
    window_dropout: float = 0.0
    """How often training drops the window of a head, so that the linear branch must carry it alone."""
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o"])
    """The projections that get adapters."""
    distill: float = 0.0
    """The share of the adapters' loss that is the divergence from the softmax model's predictions, in place of the
    cross-entropy of the text."""

    def __post_init__(self) -> None:
        _positive("linearize", self, "window", "transfer_lr", "mse_weight")
        _one_of("linearize.kind", self.kind, ("standard", "terrace"))
        _one_of("linearize.map", self.map, MAPS)
        if self.features is not None:
            _positive("linearize", self, "features")
        _need(0 < self.mix < 1, "linearize.mix", self.mix, "must be above 0 and below 1")
        _share("linearize", self, "transfer", "window_dropout", "distill")
        _not_negative("linearize", self, "entropy_weight")
        for target in self.targets:
            _one_of("linearize.targets", target, ("q", "k", "v", "o"))
        _need(bool(self.targets), "linearize.targets", "[]", "name some of q, k, v, o; for no adapters adapters.rank=0")


@dataclass(kw_only=True)
class OptimConfig:
    name: str = "adamw"
    """adamw, or lamb (You et al. 2020) for very large batches."""
    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; on matrices only, never on biases and norms."""
    schedule: str = "cosine"
    warmup: float = 0.01
    """Linear warm-up: a share of the run if below 1, else a number of steps."""
    min_lr: float = 0.1
    """The schedule's end as a share of the peak."""
    power: float = 0.5
    """Of the polynomial schedule."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, ("adamw", "lamb"))
        _positive("optim", self, "lr", "eps", "power")
        _one_of("optim.schedule", self.schedule, ("cosine", "linear", "polynomial", "constant"))
        _share("optim", self, "min_lr")
        _not_negative("optim", self, "warmup", "weight_decay", "clip")
        _need(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "must be at least 0 and below 1")


@dataclass(kw_only=True)
class TrainConfig:
    steps: int = 1000
    tokens_per_step: int = 524_288
    micro_batch: int = 8
    """Sequences in one forward pass; the accumulation follows from tokens_per_step."""
    seq_len: int = 1024
    dtype: str = "auto"
    """Of the products: bf16 (autocast; weights and optimizer stay float32) or fp32; auto is bf16 on a GPU."""
    device: str = "auto"
    compile: bool | None = None
    """Compile each transformer block and the loss, in attention transfer each layer's; null does so on a GPU."""
    cuda_graph: bool | None = None
    """Replay each step from CUDA graphs; null does so on a GPU, but not with method=linearize."""
    seed: int = 1
    deterministic: bool = False
    """Refuse kernels that do not repeat bit for bit."""

    def __post_init__(self) -> None:
        _positive("train", self, "steps", "tokens_per_step", "micro_batch", "seq_len")
        _one_of("train.dtype", self.dtype, ("auto", "bf16", "fp32"))
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        _need(known, "train.device", self.device, "choose auto, cpu, cuda or cuda:N")
        _need(0 <= self.seed <= MAX_SEED, "train.seed", self.seed, "must be 0 or more and below 2^63")
        tokens = self.micro_batch * self.seq_len
        rule = f"must be a multiple of train.micro_batch * train.seq_len = {tokens}"
        _need(self.tokens_per_step % tokens == 0, "train.tokens_per_step", self.tokens_per_step, rule)

    @property
    def accumulation(self) -> int:
        """Forward passes in one step."""
        return self.tokens_per_step // (self.micro_batch * self.seq_len)


@dataclass(kw_only=True)
class LogConfig:
    every: int = 10
    """Steps between two lines of a log that is no terminal."""
    val_every: int = 250
    """Steps between validations; 0 only at the end."""
    val_tokens: int = 262_144
    """Validation tokens of each source, at most."""
    sample_every: int = 1000
    """Steps between text samples; 0 only at the end."""
    sample_prompt: str = "The "
    sample_tokens: int = 100
    save_every: int = 500
    """Steps between checkpoints; 0 only at the end."""
    keep: int = 2
    """Newest checkpoints that stay."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _positive("log", self, "every", "val_tokens", "sample_tokens")
        _not_negative("log", self, "val_every", "sample_every", "save_every")
        _need(self.keep >= 2, "log.keep", self.keep, "keep at least 2, so that a damaged checkpoint is no loss")


@dataclass(kw_only=True)
class Config:
    method: str = "slope"
    """slope: double-pruned sparse layers with lazy adapters; dense: the same model and loop without them; sr_ste: the
    mask follows the weights in every step, the gradient goes straight through it; fst: that with transposable masks, in
    the MLPs alone, dense at the end; wanda: a mask chosen by weights and inputs, then kept; linearize: the attention of
    a trained model becomes linear, and its weights, dense or sparse, stay."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    linearize: LinearizeConfig = field(default_factory=LinearizeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        rule = "is for method=linearize alone; name a shape"
        _need(self.model.name != INIT or self.method == "linearize", "model.name", INIT, rule)
        if self.method == "linearize":
            rule = "method=linearize runs without; leave it out"
            _need(not self.train.cuda_graph, "train.cuda_graph", True, rule)
            w, length = self.linearize.window, self.train.seq_len
            near, what = (2 * w, "half of ") if self.linearize.kind == "terrace" else (w, "")
            rule = f"must be below {what}train.seq_len={length}, or nothing is left for the linear branch to learn"
            _need(near < length, "linearize.window", w, rule)
        if self.method == "fst":
            m, rule = (
                self.sparsity.m,
                "fst's transposable masks are searched for up to 4: sparsity.m=4, no sparsity.blocks",
            )
            _need(m <= 4 and not self.sparsity.blocks, "sparsity.m", m, rule)

        if self.method == "wanda":
            rule = "wanda prunes a trained model: set sparsity.start above 0, or model.init"
            _need(self.sparsity.start > 0 or self.model.init is not None, "sparsity.start", self.sparsity.start, rule)

    @property
    def sparse_step(self) -> int:
        """The first step (from 0) with sparse layers; a run that has them has them for one step at least."""
        return min(round(self.sparsity.start * self.train.steps), self.train.steps - 1)

    @property
    def adapter_step(self) -> int | None:
        """The first step (from 0) with adapters, or None; a run that has adapters has them for one step at least."""
        if self.method == "linearize":
            share = self.linearize.transfer
            without = share == 1 or not self.adapters.rank
            return None if without else min(round(share * self.train.steps), self.train.steps - 1)
        if self.method != "slope" or not self.adapters.rank:
            return None
        return max(self.sparse_step, min(round(self.adapters.start * self.train.steps), self.train.steps - 1))

    @property
    def linear_attention(self) -> LinearizeSettings:
        """The form of the linearized layers."""
        chosen = self.linearize
        return LinearizeSettings(
            feature_map=chosen.map,
            features=chosen.features,
            window=chosen.window,
            terrace=chosen.kind == "terrace",
            mix=chosen.mix,
            window_dropout=chosen.window_dropout,
            keep_softmax=tuple(chosen.keep_softmax),
            seed=self.train.seed,
        )

"""The configuration of a run as dataclasses: every key with its type, default, meaning and check.

`sparsity` holds the keys that all sparse methods share; a section named after a method, in slope_cli.config.methods,
holds the keys that only this method reads. slope_cli.methods defines what a method does in each step. `slope config
KEY` and docs/config.md print the docstring under a key. A value out of range is a UsageError that says what to set.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slope_cli.config.methods import FstConfig, LinearizeConfig, SlopeConfig, SrSteConfig, SSteConfig
from slope_cli.config.section import Section, setting, switch
from slope_cli.errors import UsageError

METHODS: Mapping[str, str] = {
    "slope": "double-pruned sparse layers with lazy adapters",
    "dense": "the same model and loop with dense layers",
    "sr_ste": "dense weights under a mask that follows them; the gradient goes straight through the mask",
    "fst": "sr_ste with transposable masks, in the MLPs alone, and dense at the end",
    "s_ste": "dense weights that soft thresholding makes N:M, in the MLPs alone; the gradient goes straight through it",
    "wanda": "a mask chosen once, by weights and inputs, for a trained model",
    "linearize": "the attention of a trained model becomes linear; its weights stay as they are",
}
MICRO_BATCH = "train.micro_batch"
FREE_KEYS = (
    "log",
    "distributed",
    "train.device",
    MICRO_BATCH,
    "train.activation_checkpointing",
    "train.precision",
    "train.bf16_finish",
    "linearize.scratch",
    "data",
)
"""Sections and keys that may change between two starts of one run: they affect the results by rounding at most."""
AUTO: Mapping[str, str] = {
    "sparsity.backend": "for each product the kernel that was measured faster",
    "train.precision": "bf16 on a GPU, fp32 on a CPU",
    "train.device": "a GPU if there is one, else the CPU",
    "train.compile": "true on a GPU, false on a CPU",
    "train.cuda_graph": "true on a GPU, false on a CPU",
    "distributed.layout": "the fastest that fits in a GPU's memory; ddp on a CPU",
    "distributed.gather": "the faster that fits in a GPU's memory",
}
"""What "auto" resolves to if that depends on the machine."""
INIT = "init"
"""The model.name that stands for the shape of model.init."""
EMBEDDED = "embedded"
MLP = "mlp"
"""The entry of sparsity.target_modules that stands for the feed-forward layers of any family."""


@dataclass(kw_only=True)
class ModelConfig(Section, section="model"):
    """The model, and the weights that it starts from."""

    name: str = setting("gpt2-nano", example="gpt2-small")
    """The shape of the model, such as gpt2-small or opt-2.7b (recipes are named after them: `slope recipes`); with
    method=linearize also "init", the shape of model.init."""
    init: str | None = setting(None, example="runs/gpt2-small")
    """Whose weights the run begins with: those of another run (RUN, or RUN@STEP for an older checkpoint), or of a
    folder that `slope export` or transformers wrote; null for random ones."""
    init_optimizer: bool = switch(False)
    """Begin with the optimizer's moments of the run model.init, too, instead of none."""
    dropout: float | None = setting(None, unit="a probability", example="0.1")
    """The probability of every dropout in the model; null for those of the shape."""
    activation: str | None = setting(None, "relu2", "sparse_relu2")
    """The activation of the MLPs of a GPT-2 or an OPT; null for that of the shape. relu2: squared ReLU, relu(x)².
    sparse_relu2: the same, of which each token keeps the 2 largest of every 4 features; for the gradient of the next
    layer's weight each feature keeps the 2 largest of every 4 tokens instead. It is computed with dense products."""
    overrides: dict[str, Any] = setting({}, example="{n_layer: 6}")
    """Fields of the model's config.json of transformers to change, by their names there: {n_layer: 6} makes a GPT-2 of
    6 blocks."""

    def _check_values(self) -> None:
        if self.dropout is not None:
            self._need(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1")
        rule = "needs model.init, a run whose optimizer it is"
        self._need(self.init is not None or not self.init_optimizer, "init_optimizer", rule)

    def unused(self, config: Config) -> dict[str, str]:
        return dict.fromkeys(("init_optimizer", "activation"), "method=linearize") if config.linearizes else {}


@dataclass(kw_only=True)
class DataConfig(Section, section="data"):
    """The training text."""

    path: str = setting(EMBEDDED, example="data/openwebtext")
    """A folder that `slope data prepare` wrote, or "embedded": the public-domain novels inside the package, as
    bytes."""
    verify: bool = switch(True)
    """Hash every token file before training (about 2 GB/s), to see that none is damaged. Those that an earlier start of
    this run has hashed are left out while their size, times and inode are the same."""
    local_copy: str | None = setting(None, example="/scratch/tokens")
    """A folder on each node's own disk, such as $SLURM_TMPDIR, to which the token files are copied first, once a node
    and for all runs on the same data; null to read them from data.path. Where it has no room, a warning is shown, and
    data.path is read."""


@dataclass(kw_only=True)
class SparsityConfig(Section, section="sparsity"):
    """The keys that all sparse methods share."""

    n: int = setting(2, unit="weights", example="1")
    """The N of the pattern N:M: of every M (sparsity.m) neighbouring weights in a row of a weight matrix N are kept,
    and the others are zero. 2:4 is sparsity.n=2 sparsity.m=4, the only one that a GPU computes fast."""
    m: int = setting(4, unit="weights", example="8")
    """The M of the pattern N:M; see sparsity.n."""
    pattern_overrides: dict[str, list[int]] = setting({}, example="{12-23: [2, 8]}")
    """Other patterns for ranges of the model's blocks, which are counted from 0: {12-23: [2, 8]} makes the last half of
    24 blocks 2:8."""
    target_modules: list[str] = setting([], example="[mlp]")
    """Which linear layers become sparse: regular expressions that are searched for in their names, or "mlp" for the
    feed-forward layers; [] for every layer that can be sparse, or with method=fst and s_ste for [mlp]."""
    exclude_modules: list[str] = setting([], example="[c_proj]")
    """Which of the layers of sparsity.target_modules stay dense nevertheless: regular expressions that are searched for
    in their names."""
    mask: str | None = setting(None, "magnitude", "random", "wanda", example="random")
    """How the first mask, which says what weights are kept, is chosen: magnitude, the largest weights; random; wanda,
    the largest products of a weight and the norm of its input. null is the method's default."""
    calibration: int = setting(32, unit="sequences", example="128")
    """Training sequences from which sparsity.mask=wanda computes the norms of the inputs."""
    start: float = setting(0.0, unit="a share of the run", example="0.5")
    """When the layers become sparse, as a share of the run: 0 is the first step, 0.5 after half of the steps. Until
    then they are dense, or what slope.before says."""
    backend: str = setting("auto", "auto", "cusparselt", "dense", "reference")
    """What computes 2:4 matrix products on a GPU: cusparselt, NVIDIA's library; dense, matrices with their zeros;
    reference, plain torch, which is slow."""

    def _check_values(self) -> None:
        rule = "an N:M pattern needs 0 < sparsity.n < sparsity.m (for 2:4 say sparsity.n=2 sparsity.m=4)"
        self._need(0 < self.n < self.m, "n", f"{rule}, and sparsity.m is {self.m}")
        for blocks, nm in self.pattern_overrides.items():
            key, rule = f"sparsity.pattern_overrides.{blocks}", "say for example sparsity.pattern_overrides.12-23=[2,8]"
            if re.fullmatch(r"\d+-\d+", blocks) is None or len(nm) != 2:
                raise UsageError(f"{key}={nm}: {rule}")
            if not 0 < nm[0] < nm[1]:
                raise UsageError(f"{key}={nm}: 0 < N < M; {rule}")
        self._share("start")
        self._positive("calibration")
        for key in ("target_modules", "exclude_modules"):
            for pattern in getattr(self, key):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UsageError(f"sparsity.{key}: {pattern!r} is not a regular expression ({error})") from None

    def unused(self, config: Config) -> dict[str, str]:
        if config.method in ("dense", "linearize"):
            return self._all(f"method={config.method}")
        return {} if self.mask == "wanda" else {"calibration": f"sparsity.mask={self.mask}"}


@dataclass(kw_only=True)
class AdapterConfig(Section, section="adapters"):
    """The low-rank adapters of method=slope and method=linearize."""

    rank: float = setting(0.0156, unit="below 1 a share of each layer's smaller side, else the rank", example="16")
    """The rank of the low-rank adapters. From 1 on it is a count, the same for every layer: 16 is rank 16. Below 1 it
    is a share of the smaller side of each layer's matrix: 0.0156 is rank 16 for a layer of 1024 x 4096, and rank 12 for
    one of 768 x 3072. 0 is no adapters."""
    start: float = setting(0.99, unit="a share of the run", example="0.9")
    """When the adapters are added, as a share of the run: 0.99 is for the last hundredth of the steps, 0 from the first
    step. With method=linearize that is linearize.transfer instead."""
    init: str = setting("lora", "lora", "gaussian")
    """How the matrices A and B of an adapter begin: B is 0 in any case, so that the adapter changes nothing at first.
    lora: A is uniform, the scaling 1; gaussian, as in the SLoPe paper's code: A is normal, the scaling 1 / rank."""
    alpha: float | None = setting(None, unit="a factor, before it is divided by the rank", example="32")
    """The output of an adapter is multiplied by alpha / rank; null is the scaling of adapters.init."""
    lr: float | None = setting(None, unit="a factor, times the update", example="1e-3")
    """The learning rate of the adapters at its peak; null is that of optim.lr."""
    schedule: str = setting("own", "own", "run")
    """own: the adapters go through the whole schedule in their own steps; run: their learning rate is the run's in each
    step, times adapters.lr / optim.lr."""
    warmup: float = setting(0.1, unit="below 1 a share of the adapters' steps, else steps", example="20")
    """With adapters.schedule=own, how long the adapters' learning rate rises linearly to its peak: below 1 a share of
    the adapters' steps, else a number of steps."""
    weight_decay: float = setting(0.0, unit="a factor, times the learning rate in each step", example="0.1")
    """Decoupled weight decay of the adapters, as in AdamW."""

    def _check_values(self) -> None:
        self._not_negative("rank", "warmup", "weight_decay")
        whole_or_share = self.rank < 1 or float(self.rank).is_integer()
        self._need(whole_or_share, "rank", "must be a whole number or a share below 1")
        self._share("start")
        for key in ("alpha", "lr"):
            if getattr(self, key) is not None:
                self._positive(key)

    def unused(self, config: Config) -> dict[str, str]:
        if config.method != "slope" and not config.linearizes:
            return self._all(f"method={config.method}")
        if config.linearizes and config.linearize.transfer == 1:
            return self._all("linearize.transfer=1")
        if not self.rank:
            return {key: why for key, why in self._all("adapters.rank=0").items() if key != "rank"}
        warmup = {"warmup": "adapters.schedule=run"} if self.schedule == "run" else {}
        return warmup | ({"start": "method=linearize"} if config.linearizes else {})


@dataclass(kw_only=True)
class DistillConfig(Section, section="distill"):
    """Learning from a teacher: of the weights, or with method=linearize of what is trained after the transfer."""

    share: float = setting(0.0, unit="a share of the loss", example="0.5")
    """The share of the loss that is the divergence from the teacher's predictions, KL(teacher || student); the rest is
    the cross-entropy of the text. 0 for no teacher."""
    teacher: str | None = setting(None, example="runs/gpt2-small")
    """The teacher, a model with this run's tokens: a run (RUN, or RUN@STEP for an older checkpoint), or a folder of
    `slope export` or transformers; null for the model of model.init. The run keeps a copy of it. With method=linearize
    it is the softmax model."""

    def _check_values(self) -> None:
        self._share("share")

    def unused(self, config: Config) -> dict[str, str]:
        if config.linearizes and config.linearize.transfer == 1:
            return self._all("linearize.transfer=1")
        if not self.share:
            return self._all("distill.share=0")
        return {"teacher": "method=linearize"} if config.linearizes else {}


@dataclass(kw_only=True)
class OptimConfig(Section, section="optim"):
    """The optimizer and the learning rate."""

    name: str = setting("adamw", "adamw", "lamb", "muon")
    """The optimizer: adamw; lamb (You et al. 2020), for very large batches; or muon (Jordan et al. 2024) for the
    matrices in the blocks, with adamw for all else: embeddings, head, norms, biases, adapters."""
    lr: float = setting(6e-4, unit="a factor, times the update", example="1e-3")
    """The learning rate at its peak: it rises to this during optim.warmup, and then falls, as optim.schedule says, to
    optim.min_lr times this. Adapters may have another one, adapters.lr. The recipes, which `slope recipes NAME` prints,
    have from 6e-3 for the smallest models to 8e-5 for the largest."""
    muon_lr: float | None = setting(None, unit="a factor, times the update", example="2e-3")
    """The learning rate at its peak of what muon updates, whose updates have the size of adamw's; null for optim.lr."""
    momentum: float = setting(0.95, unit="a share below 1", example="0.9")
    """How much muon's moving average of the gradient keeps in each step."""
    betas: tuple[float, float] = setting((0.9, 0.95), unit="two shares below 1", example="[0.9, 0.999]")
    """How much the two moving averages of adamw and lamb, of the gradient and of its square, keep in each step."""
    eps: float = setting(1e-8, unit="the size of a gradient", example="1e-6")
    """Added to the denominator of AdamW's update, so that tiny gradients make no large updates."""
    weight_decay: float = setting(0.1, unit="a factor, times the learning rate in each step", example="0.01")
    """Decoupled weight decay, as in AdamW; on matrices only, never on biases and norms."""
    schedule: str = setting("cosine", "cosine", "linear", "polynomial", "constant", "wsd")
    """How the learning rate falls from its peak after the warm-up: cosine, linear, polynomial (with optim.power) or
    constant (not at all); with wsd (warm-up, stable, decay) it stays at its peak until the decay, optim.decay."""
    warmup: float = setting(0.01, unit="below 1 a share of the run, else steps", example="200")
    """How long the learning rate rises linearly to its peak: below 1 a share of the run (0.01 is the first hundredth of
    the steps), else a number of steps."""
    min_lr: float = setting(0.1, unit="a share of the peak", example="0")
    """The learning rate of the last step, as a share of optim.lr: 0.1 is a tenth of the peak."""
    power: float = setting(0.5, unit="an exponent", example="1")
    """The exponent of optim.schedule=polynomial: 1 is linear, and below 1 the rate falls late."""
    decay: float = setting(0.2, unit="below 1 a share of the run, else steps", example="2000")
    """With optim.schedule=wsd, how long the learning rate falls: below 1 the last share of the run (0.2 is the last
    fifth of the steps), else the last steps."""
    decay_shape: str = setting("linear", "linear", "sqrt")
    """How it falls there: linear, or sqrt, by the square root of the share of the decay that is done."""
    clip: float = setting(1.0, unit="a norm", example="0")
    """The largest norm of the gradient of all weights together, to which a larger one is scaled down; 0 is no
    clipping."""

    def _check_values(self) -> None:
        self._positive("lr", "eps", "power")
        if self.muon_lr is not None:
            self._positive("muon_lr")
        self._share("min_lr")
        self._not_negative("warmup", "weight_decay", "decay", "clip")
        self._need(all(0 <= b < 1 for b in self.betas), "betas", "must be at least 0 and below 1")
        self._need(0 <= self.momentum < 1, "momentum", "must be at least 0 and below 1")

    def check(self, config: Config) -> None:
        rule = "is not for method=linearize; choose adamw"
        self._need(self.name != "muon" or config.method != "linearize", "name", rule)

    def unused(self, config: Config) -> dict[str, str]:
        unused = {} if self.name == "muon" else dict.fromkeys(("muon_lr", "momentum"), f"optim.name={self.name}")
        if self.schedule != "wsd":
            unused |= dict.fromkeys(("decay", "decay_shape"), f"optim.schedule={self.schedule}")
        if self.schedule != "polynomial":
            unused["power"] = f"optim.schedule={self.schedule}"
        if config.method != "linearize":
            return unused
        if config.linearize.every:
            return unused
        unused["weight_decay"] = "method=linearize"
        if config.linearize.transfer == 1:
            unused["lr"] = "linearize.transfer=1"
        elif not config.adapters.rank:
            unused["lr"] = "adapters.rank=0"
        return unused


@dataclass(kw_only=True)
class TrainConfig(Section, section="train"):
    """Steps, batches, and how they are computed."""

    steps: int = setting(1000, unit="steps", example="10000")
    """How many optimizer steps the run takes, each of train.tokens_per_step tokens. With more of them the same command
    extends a run."""
    extended: list[list[int]] = setting([], unit="steps", example="[[500, 500]]")
    """Written by the program when a run is extended, and not to be set: [step, train.steps until then] for each time.
    What had begun by that step stays where it was; what had not, and the learning rate, follow the new length."""
    tokens_per_step: int = setting(524_288, unit="tokens", example="65536")
    """The batch size: how many tokens one optimizer step sees, on all GPUs together. Each GPU reads train.micro_batch
    sequences of train.seq_len tokens at once, and accumulates the gradient of as many of these as make up the step. So
    it is a multiple of train.micro_batch * train.seq_len * the number of GPUs: 524288 is 512 sequences of 1024
    tokens."""
    micro_batch: int = setting(8, unit="sequences", example="4")
    """How many sequences one GPU reads at once. Lower it if memory is short: how many times it does so in a step
    follows from train.tokens_per_step, and the result is the same but for rounding."""
    seq_len: int = setting(1024, unit="tokens", example="64")
    """How many tokens a training sequence has; at most the positions of the model."""
    precision: str = setting("auto", "auto", "bf16", "fp32", "fp8")
    """In what precision products are computed: fp32; bf16 (by autocast; weights and optimizer stay float32); or fp8,
    which is bf16 but for the linear layers that the method makes sparse, or would, whose operands are e4m3 in training
    with one scale a tensor. It may change between two starts of a run, which is then not repeated bit for bit."""
    bf16_finish: float = setting(0.0, unit="a share of the run", example="0.1")
    """With train.precision=fp8, how much of the run, at its end, is in bf16 nevertheless: 0.1 is the last tenth."""
    device: str = setting("auto", example="cuda:1")
    """Where the run is trained: cpu, cuda, or cuda:N for the GPU of this number, from 0."""
    compile: bool | str = switch("auto")
    """Compile each transformer block and the loss with torch.compile; in attention transfer, the loss of each layer."""
    cuda_graph: bool | str = switch("auto")
    """Record the kernels of a step as CUDA graphs and replay them, so that the GPU need not wait for Python."""
    activation_checkpointing: str = setting("none", "none", "block", "selective")
    """Which activations are computed again in the backward pass instead of kept, for less memory: none; block, all of
    each transformer block; selective, all but the outputs of its matrix products and of attention."""
    seed: int = setting(1, example="2")
    """The seed of initial weights, random masks, the order of the data, and dropout."""
    deterministic: bool = switch(False)
    """Let torch refuse kernels whose results differ from run to run (torch.use_deterministic_algorithms)."""

    def _check_values(self) -> None:
        self._positive("steps", "tokens_per_step", "micro_batch", "seq_len")
        self._not_negative("seed")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        self._need(known, "device", "choose auto, cpu, cuda or cuda:N")
        for key in ("compile", "cuda_graph"):
            self._need(getattr(self, key) in (True, False, "auto"), key, "choose true, false or auto")
        lengths = [pair[-1] for pair in self.extended] + [self.steps]
        rule = "needs [step, steps] for each extension, with fewer steps than later"
        ordered = all(a < b for a, b in itertools.pairwise(lengths))
        self._need(ordered and all(len(p) == 2 and 0 <= p[0] <= p[1] for p in self.extended), "extended", rule)
        self._share("bf16_finish")
        tokens = self.micro_batch * self.seq_len
        rule = f"must be a multiple of train.micro_batch * train.seq_len = {tokens}"
        self._need(self.tokens_per_step % tokens == 0, "tokens_per_step", rule)

    def unused(self, config: Config) -> dict[str, str]:
        return {} if self.precision == "fp8" else {"bf16_finish": f"train.precision={self.precision}"}

    def step_at(self, share: float, *, rest: int = 1) -> int:
        """The step, counted from 0, at a share of the run, with `rest` steps at least from there on.

        A step that was taken before the run was extended stays where it was.
        """
        for taken, steps in self.extended:
            if (step := min(round(share * steps), steps - rest)) < taken:
                return step
        return min(round(share * self.steps), self.steps - rest)

    def accumulation(self, world: int = 1) -> int:
        """Forward passes of each of `world` processes per optimizer step; UsageError if they cannot share it."""
        tokens = self.micro_batch * self.seq_len * world
        if rest := self.tokens_per_step % tokens:
            near = sorted({max(self.tokens_per_step - rest, tokens), self.tokens_per_step - rest + tokens})
            share = self.tokens_per_step // (self.seq_len * world)
            whole = self.tokens_per_step % (self.seq_len * world) == 0
            fits = [n for n in range(share, 0, -1) if share % n == 0 and n < self.micro_batch][:1] if whole else []
            advice = [f"train.micro_batch={n}" for n in fits] + [f"train.tokens_per_step={n}" for n in near]
            rule = f"train.micro_batch * train.seq_len * {world} processes = {tokens}; set {' or '.join(advice)}"
            raise UsageError(f"train.tokens_per_step={self.tokens_per_step}: is no multiple of {rule}")
        return self.tokens_per_step // tokens


@dataclass(kw_only=True)
class DistributedConfig(Section, section="distributed"):
    """A run of several processes, each with a GPU of its own."""

    layout: str = setting("auto", "auto", "ddp", "fsdp", "hsdp")
    """Where weights, gradients and moments lie when several GPUs train: ddp, all of them on every GPU; fsdp, split over
    all GPUs; hsdp, split over the GPUs of a group, and every group has all of them. `slope pretrain RECIPE --dry-run
    --gpus N` prints the memory and the traffic of each."""
    gather: str = setting("auto", "auto", "step", "block")
    """With distributed.layout=fsdp or hsdp, where a GPU has a part of the weights and fetches the others to compute
    with them: how long it keeps what it fetched. block: for the forward or the backward pass of one transformer block,
    which needs the least memory; step: for a whole optimizer step, which needs the least communication."""
    rendezvous_timeout: float = setting(300.0, unit="seconds", example="600")
    """How long the processes of a run wait for one another at its start, before it ends with an error."""

    def _check_values(self) -> None:
        self._positive("rendezvous_timeout")


@dataclass(kw_only=True)
class LogConfig(Section, section="log"):
    """Logging, validation, sampling and checkpoints."""

    every: int = setting(10, unit="steps", example="100")
    """Steps between two progress lines if standard error is not a terminal, and between two measurements of how much
    the masks change."""
    norms_every: int = setting(0, unit="steps", example="100")
    """How often the norms of each layer's gradient and update are logged, in steps: as records `norms` in
    metrics.jsonl, and in TensorBoard. They show which layers learn too slowly, or diverge. Such a step keeps a copy of
    the trained weights meanwhile. 0 is never."""
    val_every: int = setting(250, unit="steps", example="1000")
    """Steps between two validations; 0 for one at the end alone."""
    val_tokens: int = setting(262_144, unit="tokens", example="1000000")
    """How many validation tokens of each source are read in a validation, at most."""
    sample_every: int = setting(1000, unit="steps", example="5000")
    """Steps between two text samples; 0 for one at the end alone."""
    sample_prompt: str = setting("The ", example="Once upon a time")
    """The text that the samples continue."""
    sample_tokens: int = setting(100, unit="tokens", example="50")
    """How many tokens a sample has."""
    save_every: int = setting(500, unit="steps", example="1000")
    """Steps between two checkpoints; 0 for one at the end alone. A stop by a signal saves one, too."""
    keep: int = setting(2, unit="checkpoints", example="5")
    """How many of the newest checkpoints are kept, at least 2. One that was saved with a larger number
    stays while it is among so many; to free the disk remove its folder."""
    plot: bool = switch(True)
    """Draw the losses at the end, as loss.png and loss.svg in the run's folder; `slope plot RUN` draws them, too."""
    tensorboard: bool = switch(True)
    """Write the metrics to TensorBoard files in the run's folder, too."""
    wandb: bool = switch(False)
    """Send the metrics to Weights & Biases, too; needs the extra `wandb`."""
    wandb_project: str = setting("slope", example="my-project")
    """The project on Weights & Biases; WANDB_ENTITY in the environment names its owner."""

    def _check_values(self) -> None:
        self._positive("every", "val_tokens", "sample_tokens")
        self._not_negative("norms_every", "val_every", "sample_every", "save_every")
        self._need(self.keep >= 2, "keep", "keep at least 2, in case one is damaged")
        self._need(bool(self.wandb_project), "wandb_project", "must have a name")

    def unused(self, config: Config) -> dict[str, str]:
        return {} if self.wandb else {"wandb_project": "log.wandb=false"}


@dataclass(kw_only=True)
class Config:
    """The whole configuration; values that follow from other keys are filled in."""

    method: str = setting("slope", *METHODS)
    """What is trained; see `slope config method`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    slope: SlopeConfig = field(default_factory=SlopeConfig)
    sr_ste: SrSteConfig = field(default_factory=SrSteConfig)
    fst: FstConfig = field(default_factory=FstConfig)
    s_ste: SSteConfig = field(default_factory=SSteConfig)
    linearize: LinearizeConfig = field(default_factory=LinearizeConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def teacher(self) -> str | None:
        """The teacher of a run that has one, as it is named; None if nothing names one."""
        return self.distill.teacher or self.model.init

    @property
    def learns_from_teacher(self) -> bool:
        """Whether the run trains its weights with a teacher, which it keeps."""
        return self.distill.share > 0 and not self.linearizes

    @property
    def linearizes(self) -> bool:
        """Whether the run turns a model's attention into linear attention."""
        return self.method == "linearize"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method={self.method}: choose one of {', '.join(METHODS)}")
        if self.model.name == INIT and self.method != "linearize":
            raise UsageError(f"model.name={INIT}: is only for method=linearize; name a shape")
        s, wanda = self.sparsity, self.method == "wanda"
        s.mask = s.mask or ("wanda" if wanda else "magnitude")
        s.target_modules = s.target_modules or [MLP] * (self.method in ("fst", "s_ste"))
        self.adapters.lr = self.adapters.lr or self.optim.lr
        if self.optim.name == "muon":
            self.optim.muon_lr = self.optim.muon_lr or self.optim.lr
        self.optim.check(self)
        if wanda:
            s._need(s.mask == "wanda", "mask", "method=wanda chooses masks by wanda")
            rule = "wanda prunes a trained model: set sparsity.start above 0, or model.init"
            s._need(s.start > 0 or self.model.init is not None, "start", rule)
        if self.linearizes and self.train.precision == "fp8":
            raise UsageError("train.precision=fp8: is not for method=linearize; set bf16 or fp32")
        if self.model.activation == "sparse_relu2" and self.train.precision == "fp8":
            raise UsageError("model.activation=sparse_relu2: is not for train.precision=fp8")
        if self.learns_from_teacher:
            rule = "needs a teacher: set distill.teacher, or model.init for that model"
            self.distill._need(bool(self.teacher), "share", rule)
        if own := self.own_section:
            own.check(self)

    @property
    def following_lr(self) -> set[str]:
        """The keys of learning rates that have the value of optim.lr, which they follow unless they were set."""
        own = {"adapters.lr": self.adapters.lr, "optim.muon_lr": self.optim.muon_lr}
        return {key for key, lr in own.items() if lr == self.optim.lr}

    @property
    def own_section(self) -> Section | None:
        """The section that only this method reads, if it has one."""
        section: Section | None = getattr(self, self.method, None)
        return section

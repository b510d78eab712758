"""The result files of `slope bench`, one for each kind of measurement.

Times are in milliseconds, sizes in bytes. None: not measured, also in a row with an error.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from slope_cli.compare.summary import Comparison, Gap, Spread, Summary
from slope_cli.config.schema import Config
from slope_cli.methods import phases_of
from slope_cli.utils.environment import environment, gpu_libraries


class OfMethod:
    """A training variant, or a measurement of one."""

    method: str

    @property
    def dense(self) -> bool:
        """Whether all layers of the model are dense."""
        return is_dense(self.method)


def is_dense(method: str) -> bool:
    """Whether all layers of a model that is trained so are dense."""
    return phases_of(Config(method=method)).dense


@dataclass(kw_only=True)
class Results:
    """The head of each file, by default of this machine."""

    machine: dict[str, Any] = field(default_factory=environment)
    libraries: dict[str, str | None] = field(default_factory=gpu_libraries)


@dataclass(kw_only=True)
class Incomplete:
    """Rows, and why some are missing."""

    not_run: str = ""


@dataclass(kw_only=True)
class Case:
    """An entry of cases.yaml, which explains the fields."""

    name: str
    seq_len: int
    tokens: int
    depths: tuple[int, ...] = ()
    paper: float | None = None
    target: float | None = None
    aim: float | None = None


def cases() -> dict[str, Case]:
    """All cases by name, the most important first."""
    entries = yaml.safe_load(Path(__file__).with_name("cases.yaml").read_text()).items()
    return {name: Case(name=name, **{**entry, "depths": tuple(entry["depths"])}) for name, entry in entries}


@dataclass(frozen=True, kw_only=True)
class StepRow(OfMethod):
    """A training step of one variant of a case, cut to `depth` blocks.

    dense_ms: the fastest dense variant in 16 bits, in the same rounds if `alternated`, else just before.
    ratio: dense_ms over step_ms. further_ms, dense_further_ms: what each further micro-batch of a step adds, forward
    and backward. seconds: to build and measure. backends: how the layers' sparse products ran.
    """

    case: str
    depth: int
    variant: str
    method: str
    alternated: bool
    precision: str = "bf16"
    error: str = ""
    step_ms: float | None = None
    dense_ms: float | None = None
    ratio: float | None = None
    further_ms: float | None = None
    dense_further_ms: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    seconds: float | None = None
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)

    def speed_up(self, micro_batches: int) -> "Speedup | None":
        """Of a step of so many micro-batches; None if it is not known."""
        dense_ms = _lasting(self.dense_ms, self.dense_further_ms, micro_batches)
        own_ms = _lasting(self.step_ms, self.further_ms, micro_batches)
        return Speedup.of(dense_ms, own_ms) if dense_ms and own_ms else None


def _lasting(first_ms: float | None, further_ms: float | None, micro_batches: int) -> float | None:
    """The time of a step of so many micro-batches; None if it is not known."""
    if micro_batches == 1 or first_ms is None:
        return first_ms
    return None if further_ms is None else first_ms + (micro_batches - 1) * further_ms


@dataclass(frozen=True)
class Speedup:
    """A time of a dense and of a sparse model, and their ratio."""

    dense_ms: float
    sparse_ms: float
    ratio: float

    @classmethod
    def of(cls, dense_ms: float, sparse_ms: float) -> "Speedup":
        """With the ratio of the times."""
        return cls(dense_ms, sparse_ms, dense_ms / sparse_ms)


@dataclass(frozen=True)
class StepSummary:
    """The fastest variant of one kind, sparse in 16 bits if nothing else is said, against the fastest dense one there.

    timed: of the model of `depth` blocks. block: of one block, the difference of two depths. whole: of the whole
    model, extrapolated by the time of a block.
    """

    depth: int
    dense: str | None
    sparse: str
    timed: Speedup
    block: Speedup | None = None
    whole: Speedup | None = None


@dataclass(kw_only=True)
class CaseResult(Case, Incomplete):
    """The rows of a case.

    blocks: of the whole model. flops_per_token: of the dense model, forward and backward, attention's counted.
    """

    blocks: int
    flops_per_token: int | None = None
    rows: list[StepRow] = field(default_factory=list)
    summary: StepSummary | None = None

    def compared(self, *, dense: bool, precision: str, micro_batches: int = 1) -> StepSummary | None:
        """The fastest variants of a kind with the fastest dense ones in 16 bits; None if one is missing.

        A block is not compared if one depth was timed in alternating rounds and the other was not: their difference
        would not be a block's time.
        """
        by_depth = [[row for row in self.rows if row.depth == depth] for depth in sorted(self.depths)]
        first, last = (fastest(by_depth[at], dense=dense, precision=precision) for at in (0, -1))
        if not last or not (timed := last.speed_up(micro_batches)):
            return None
        best = fastest(by_depth[-1], dense=True)
        result = StepSummary(last.depth, best.variant if best else None, last.variant, timed)
        if not first or first is last or first.alternated != last.alternated:
            return result
        if not (less := first.speed_up(micro_batches)):
            return result
        blocks, more = last.depth - first.depth, self.blocks - last.depth
        block = Speedup.of((timed.dense_ms - less.dense_ms) / blocks, (timed.sparse_ms - less.sparse_ms) / blocks)
        whole = Speedup.of(timed.dense_ms + more * block.dense_ms, timed.sparse_ms + more * block.sparse_ms)
        return replace(result, block=block, whole=whole)

    def whole_times(self, found: StepSummary | None) -> Speedup | None:
        """The times of the whole model by a comparison, measured or extrapolated; None if neither is known."""
        if found is None:
            return None
        return found.whole or (found.timed if found.depth == self.blocks else None)


def fastest(rows: Sequence[StepRow], *, dense: bool, precision: str = "bf16") -> StepRow | None:
    """The row of the fastest dense variant, or of the fastest sparse one; None if none ran."""
    same = [row for row in rows if (row.dense, row.precision) == (dense, precision)]
    ran = [(row.step_ms, row) for row in same if row.step_ms is not None]
    return min(ran, key=lambda pair: pair[0])[1] if ran else None


@dataclass(kw_only=True)
class StepResults(Results):
    """step.json."""

    cases: list[CaseResult] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class GemmRow:
    """A product of a transformer block: its matrix (rows, columns) times `tokens` inputs.

    product: forward, input_grad, or torch for PyTorch's own 2:4 product. choose_s: seconds of the search. sparse,
    reason, algorithm: the choice that training makes.
    """

    width: int
    tokens: int
    matrix: str = ""
    product: str = ""
    rows: int | None = None
    columns: int | None = None
    error: str = ""
    choose_s: float | None = None
    sparse: bool = False
    reason: str = ""
    sparse_ms: float | None = None
    dense_ms: float | None = None
    algorithm: dict[str, int] = field(default_factory=dict)
    torch_ms: float | None = None


@dataclass(kw_only=True)
class GemmResults(Results, Incomplete):
    """gemm.json."""

    rows: list[GemmRow] = field(default_factory=list)


@dataclass(frozen=True)
class Bytes:
    """Sizes of a dense model, a sparse one, or adapters.

    state: float32 weights, gradients and AdamW moments, and mask bits. inference: 16-bit weights, sparse layers packed.
    copies: the 16-bit operands of the products: casts of dense layers, values and metadata of W^R and of W^{R,C}.
    """

    state: int
    inference: int
    copies: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """The memory of a whole model, estimated from its shapes; ratios are of sparse over dense."""

    case: str
    parameters: int
    in_sparse_layers: int
    dense: Bytes
    sparse: Bytes
    adapters: Bytes
    state_ratio: float
    state_ratio_with_adapters: float
    state_and_copies_ratio: float
    inference_ratio: float
    inference_ratio_with_adapters: float


@dataclass(frozen=True, kw_only=True)
class AllocatorRow(OfMethod):
    """The training state of a model cut to `depth` blocks: by shapes, over live tensors, at the allocator's peak."""

    case: str
    method: str
    depth: int
    error: str = ""
    estimated: int | None = None
    counted: int | None = None
    allocated: int | None = None


@dataclass(kw_only=True)
class MemoryResults(Results, Incomplete):
    """memory.json."""

    cases: list[MemoryRow] = field(default_factory=list)
    allocator: list[AllocatorRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DecodeMemory:
    """The memory of one sequence in 16 bits, estimated from the shapes of a model.

    linear_bytes: of the linearized layers, at any length; softmax_bytes: of the same layers with softmax attention, per
    token; kept_bytes: of the other layers, per token. break_even: tokens from which on the linearized layers need less.
    note: parts of the model that are left out.
    """

    model: str
    note: str = ""
    layers: int
    linear_layers: int
    window: int
    kind: str
    parameters: int
    linear_bytes: int
    softmax_bytes: int
    kept_bytes: int
    break_even: int

    def remembered(self, length: int) -> tuple[int, int]:
        """Bytes of a sequence of `length` tokens in all layers: with softmax attention, and linearized."""
        kept = self.kept_bytes * length
        return self.softmax_bytes * length + kept, self.linear_bytes + kept


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """A measurement of a model on one side: softmax, linear, or linear compiled.

    part: "largest", the largest batch, and the limit that stopped the next one; "both", "own" and "speed", steps at the
    largest batch of both sides, at the side's own, and at given ones; "transfer", a step of attention transfer.
    """

    model: str = ""
    part: str
    side: str = ""
    length: int | None = None
    batch: int | None = None
    error: str = ""
    limit: str = ""
    bytes_per_sequence: int | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    graphed: bool = False
    note: str = ""
    remembered_bytes: int | None = None
    peak_bytes: int | None = None
    compiled: bool = False


@dataclass(kw_only=True)
class ModelResult(Incomplete):
    """The rows of a model."""

    memory: DecodeMemory
    rows: list[DecodeRow] = field(default_factory=list)


@dataclass(kw_only=True)
class LinearizeResults(Results):
    """linearize.json."""

    models: list[ModelResult] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `slope bench generate`, `products` and, by its variants alone, `step` measure.

    batches: texts that are continued at once. context: tokens of each that a step's attention reads. prompt: at most so
    many are read before the first token. variants, against: names that `variants` knows, those of steps that `measure`
    does; none for the usual ones. depth: only so many blocks; None for all. tokens: of single products. device: "cpu",
    or "" for the GPU.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    context: int = 1024
    prompt: int = 2048
    variants: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    depth: int | None = None
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class GenerateRow:
    """A measurement of one variant of a model.

    part: "prefill", from a prompt of `tokens` to its first new token on the host; "decode", a step that adds a token to
    each of `batch` texts of `tokens`. dense_ms: of the dense model in the same engine, in the same rounds if
    `alternated`; ratio: dense_ms over step_ms. read_bytes: weights, keys, values and states that a step reads;
    bound_ms: reading them at the bandwidth with which the device copies. weight_bytes: on the device. remembered_bytes:
    of all texts, keys, values and states. peak_bytes: weights, what is remembered, and the allocator's peak above
    these; None on a CPU.
    """

    part: str
    variant: str
    tokens: int
    batch: int = 1
    error: str = ""
    alternated: bool = True
    step_ms: float | None = None
    dense_ms: float | None = None
    ratio: float | None = None
    tokens_per_s: float | None = None
    read_bytes: int | None = None
    bound_ms: float | None = None
    weight_bytes: int | None = None
    remembered_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(kw_only=True)
class GeneratingModel(Incomplete):
    """The rows of a model, of which `blocks` of `all_blocks` were timed."""

    model: str
    blocks: int
    all_blocks: int
    rows: list[GenerateRow] = field(default_factory=list)


@dataclass(kw_only=True)
class GenerateResults(Results):
    """generate.json."""

    plan: Plan = field(default_factory=Plan)
    models: list[GeneratingModel] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ProductRow:
    """A product of a model's block, (rows, columns) times `tokens` inputs: 2:4 by PackedLinear against a dense one.

    bound: how many times fewer bytes its weights have.
    """

    model: str
    matrix: str
    rows: int
    columns: int
    tokens: int
    error: str = ""
    dense_ms: float | None = None
    sparse_ms: float | None = None
    ratio: float | None = None
    bound: float | None = None


@dataclass(kw_only=True)
class ProductResults(Results, Incomplete):
    """products.json."""

    plan: Plan = field(default_factory=Plan)
    rows: list[ProductRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class KillRow:
    """Random SIGKILLs of a command, which was started again until it ended.

    ranks: its processes, of which a kill takes one or all; hangs: kills of one after which the others did not end.
    lives: its ends; lost: those that it did not reach, or that cannot be read; unequal: those that differ from the
    uninterrupted command's, by what differs. setup_s: before it writes a file; longest_restart_s: of a start after a
    kill, to the end.
    """

    command: str
    ranks: int = 1
    kills: int
    hangs: int = 0
    lives: int
    lost: list[str]
    unequal: list[str]
    uninterrupted_s: float
    setup_s: float
    longest_restart_s: float | None


@dataclass(kw_only=True)
class KillResults(Results):
    """The file of `python -m slope_cli.benchmarks.kills`."""

    seed: int
    jobs: int
    rows: list[KillRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RecallRow:
    """A model of `python -m slope_cli.benchmarks.recall`: the teacher, or what it became.

    words: the settings that are this model's own. tokens, seconds: of its training. kept: layers or KV heads that were
    chosen to keep softmax attention. sources: perplexity of each one's validation text. cells: the rows of
    `measure_recall`. remembered: bytes of one sequence by its tokens, from shapes. decode: steps of the engine by
    tokens and batch, whose dense_ms is of a softmax model with random weights in the same rounds.
    """

    variant: str
    words: list[str]
    tokens: int
    seconds: float
    kept: list[int | str] = field(default_factory=list)
    perplexity: float
    sources: dict[str, float]
    cells: list[dict[str, Any]]
    remembered: dict[int, int]
    decode: list[GenerateRow] = field(default_factory=list)


@dataclass(kw_only=True)
class RecallResults(Results):
    """The file of `python -m slope_cli.benchmarks.recall`; window: of the linearized layers, of `layers` in all."""

    model: str
    scale: str
    parameters: int
    layers: int
    length: int
    window: int
    share: float
    words: list[str]
    rows: list[RecallRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TunedVariant:
    """A variant of `python -m slope_cli.benchmarks.quality` and its learning rate.

    words: its own settings. rates: what was tried. lr: the best of them, None if none is; inside: it is neither the
    lowest nor the highest. like: the variant whose rate it takes instead, with what is known of that.
    """

    variant: str
    words: list[str] = field(default_factory=list)
    rates: list[Summary] = field(default_factory=list)
    lr: float | None = None
    inside: bool = False
    like: str = ""


@dataclass(kw_only=True)
class QualityResults(Results):
    """The file of `python -m slope_cli.benchmarks.quality`.

    words: settings of all runs. tokens, tuning_tokens: of dense in the finals, and of a run that tries a rate. not_run:
    the variants that the finals lack, or some of whose runs they do, and why.
    """

    scale: str
    recipe: str
    words: list[str] = field(default_factory=list)
    tokens: int
    tuning_tokens: int
    tuned: list[TunedVariant] = field(default_factory=list)
    finals: Comparison | None = None
    not_run: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class BenchResults:
    """The parts of one `slope bench` and the folder of their files; None for a part that was not asked for."""

    folder: str = ""
    memory: MemoryResults | None = None
    step: StepResults | None = None
    gemm: GemmResults | None = None
    linearize: LinearizeResults | None = None
    generate: GenerateResults | None = None
    products: ProductResults | None = None

    def to_json(self) -> dict[str, Any]:
        """The folder and the existing parts, by name."""
        return {name: part for name, part in asdict(self).items() if part is not None}


@dataclass(frozen=True)
class ProjectedRow:
    """A variant of `slope compare` at the speed of a big model.

    time: of its run, in parts of the dense one's in bf16; times, until: likewise. loss, gap: after the last step.
    losses: at `times`. until: when the dense run's last loss is reached; None if it is not.
    """

    variant: str
    time: float
    loss: Spread
    gap: Gap | None
    times: list[float]
    losses: list[float]
    until: float | None


@dataclass(frozen=True)
class Projection:
    """The file of `python -m slope_cli.benchmarks.projection`: losses of `trained`, times of `model` on a GPU."""

    model: str
    trained: str
    gpu: str
    rows: list[ProjectedRow]

"""The measurements of `slope bench` on the GPU, by kind.

    python -m slope_cli.benchmarks.measure step opt-2.7b '{}'
    python -m slope_cli.benchmarks.measure state opt-2.7b gpt2-small
    python -m slope_cli.benchmarks.measure gemm 2560 4096
    python -m slope_cli.benchmarks.measure linearize llama-small
    python -m slope_cli.benchmarks.measure generate opt-6.7b '{"batches": [1, 16]}'
    python -m slope_cli.benchmarks.measure products opt-6.7b '{"tokens": [1, 16]}'

Each row is printed as a line of JSON as soon as it is measured. `slope bench` runs this in a separate process, so that
a crash or a hang of the GPU costs only one case.
"""

import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import sparse_kernels
from slope_cli.checkpoint import store
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.errors import UsageError, did_you_mean
from slope_cli.methods import optim, phases_of
from slope_cli.methods.accounting import account
from slope_cli.methods.apply import apply
from slope_cli.models import shapes
from slope_cli.models.build import build_model, run_model_config
from slope_cli.train.cuda_graphs import GraphedStep
from slope_cli.train.step import MaskUpdate, Step, StepOutput
from slope_cli.utils.typed_json import from_json

from . import generate, linearize_decoding, products
from .gemm import gemm
from .records import (
    AllocatorRow,
    Case,
    DecodeRow,
    GemmRow,
    GenerateRow,
    OfMethod,
    Plan,
    ProductRow,
    StepRow,
    cases,
    fastest,
)
from .timing import Peak, Timing, free, one_line, random_model

Row = StepRow | AllocatorRow | GemmRow | DecodeRow | GenerateRow | ProductRow
STEP_TIMING = Timing(warm_up=3, rounds=7, round_seconds=0.15, most_calls=20, heat_seconds=2.0)
MICRO_BATCHES = 2
"""Of the longer of two steps, by which the time of a further micro-batch is measured."""


@dataclass(frozen=True)
class Variant(OfMethod):
    """A training variant."""

    name: str
    method: str
    compiled: bool = False
    graphed: bool = False
    precision: str = "bf16"


VARIANTS = (
    Variant("dense compiled + graph", "dense", compiled=True, graphed=True),
    Variant("dense compiled", "dense", compiled=True),
    Variant("dense eager", "dense"),
    Variant("sparse compiled + graph", "slope", compiled=True, graphed=True),
    Variant("sparse eager", "slope"),
    Variant("dense fp8 compiled + graph", "dense", compiled=True, graphed=True, precision="fp8"),
    Variant("sparse fp8 compiled + graph", "slope", compiled=True, graphed=True, precision="fp8"),
)
PRECISIONS = ("bf16", "fp8")


def step_variants(names: Sequence[str]) -> list[Variant]:
    """The variants of these names, in the order of VARIANTS; all for no names; UsageError for an unknown one."""
    known = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--variants {unknown[0]}: is unknown; {did_you_mean(unknown[0], known)}")
    return [variant for name, variant in known.items() if not names or name in names]


def case_config(case: Case, method: str, depth: int | None = None, precision: str = "bf16") -> Config:
    """The case's recipe with its batch, without dropout; cut to `depth` blocks, or whole."""
    overrides = [f"method={method}", "model.dropout=0", f"train.seq_len={case.seq_len}"]
    overrides += [] if precision == "bf16" else [f"train.precision={precision}"]
    overrides += [f"train.micro_batch={case.tokens // case.seq_len}", f"train.tokens_per_step={case.tokens}"]
    if depth is not None:
        overrides.append(f"model.overrides.num_hidden_layers={depth}")
    return configs.load(case.name, overrides)


class Runner:
    """A model that takes training steps on one random batch, with the mask updates of a run.

    Attributes:
        peak_bytes: the allocator's peak in the first steps, which have MICRO_BATCHES, above what was held before; None
            on a CPU.
        loss: of the last of these steps.
    """

    def __init__(self, config: Config, variant: Variant, device: torch.device, timing: Timing = STEP_TIMING) -> None:
        peak = Peak(device)
        self.model = build(config, device)
        self.variant, self._phase, self._steps = variant, phases_of(config).at(0), 0
        optimizer = optim.build_optimizer(self.model, config, phases_of(config))
        dtype = torch.bfloat16 if device.type == "cuda" else None
        step = Step(self.model, optimizer, dtype=dtype, clip=config.optim.clip, compiled=variant.compiled)
        self._step = GraphedStep(step) if variant.graphed else step
        objective = shapes.objective(self.model.config)
        self._batch = random_batch(config, self.model.config.vocab_size, objective, device)
        if device.type == "cuda":
            sparse_kernels.prepare(self.model, config.train.tokens_per_step)  # keeps its measurements out of the peak
            peak.restart()
        for _ in range(timing.warm_up):
            self.loss = self.step(MICRO_BATCHES).loss  # of more than one, so that graphs of both kinds are captured
        self.peak_bytes = peak.above_start()

    def step(self, micro_batches: int = 1) -> StepOutput:
        """Take one step, of the same micro-batch so many times."""
        update = MaskUpdate() if self._phase.updates_masks(self._steps) else None
        self._steps += 1
        return self._step([self._batch] * micro_batches, update)

    def longer(self) -> StepOutput:
        """Take a step of MICRO_BATCHES."""
        return self.step(MICRO_BATCHES)


def build(config: Config, device: torch.device) -> Any:
    """The model of a run's first step, its weights drawn on the device."""
    torch.manual_seed(config.train.seed)
    model = random_model(run_model_config(config), device).train()
    apply(model, config, phases_of(config).at(0))
    return model


def random_batch(config: Config, vocab: int, objective: shapes.Objective, device: torch.device) -> dict[str, Tensor]:
    """Random tokens; for "masked" with 15 % of them labelled, and BERT's two other inputs."""
    size = config.train.micro_batch, config.train.seq_len
    batch = {name: torch.randint(vocab, size, device=device) for name in ("input_ids", "labels")}
    if objective == "masked":
        unlabelled = torch.rand(size, device=device) > 0.15
        batch["labels"][unlabelled] = IGNORED_LABEL
        batch["token_type_ids"] = torch.randint(2, size, device=device)
        batch["next_sentence_label"] = torch.randint(2, size[:1], device=device)
    return batch


def step(
    case: Case, device: torch.device, variants: Sequence[Variant] = VARIANTS, timing: Timing = STEP_TIMING
) -> Iterator[StepRow]:
    """Rows of all variants at the largest depth, then of the fastest dense and sparse one at the smaller depth."""
    *smaller, largest = case.depths
    rows = []
    for row in depth_rows(case, largest, variants, device, timing):
        rows.append(row)
        yield row
    kinds = itertools.product((True, False), PRECISIONS)
    found = (fastest(rows, dense=dense, precision=precision) for dense, precision in kinds)
    best = {one.variant for one in found if one is not None}
    for depth in smaller:
        yield from depth_rows(case, depth, [variant for variant in variants if variant.name in best], device, timing)


def depth_rows(
    case: Case, depth: int, variants: Sequence[Variant], device: torch.device, timing: Timing = STEP_TIMING
) -> Iterator[StepRow]:
    """Time variants in their order, each in alternating rounds with the fastest dense one in 16 bits before it.

    Where the two do not fit into memory together, that variant and the following ones are timed alone: "alternated" is
    false, and the dense variant they are compared with is built and timed again just before.
    """

    def attempt(variant: Variant) -> tuple[Runner | None, StepRow]:
        row = StepRow(
            case=case.name,
            depth=depth,
            variant=variant.name,
            method=variant.method,
            alternated=best is not None,
            precision=variant.precision,
        )
        started = time.perf_counter()
        try:
            config = case_config(case, variant.method, depth, variant.precision)
            runner = Runner(config, variant, device, timing)
            sides = [runner, *([best] if best else [])]
            times = timing.medians(*(work for side in sides for work in (side.step, side.longer)))
            row = replace(row, step_ms=1e3 * times[0], further_ms=_further_ms(*times[:2]), peak_bytes=runner.peak_bytes)
            if best:
                row = replace(row, dense_ms=1e3 * times[2], dense_further_ms=_further_ms(*times[2:]))
            row = replace(row, loss=runner.loss, seconds=time.perf_counter() - started)
            return runner, replace(row, backends=backends(runner.model))
        except Exception as error:  # the other variants are still measured
            return None, replace(row, error=one_line(error))

    best: Runner | None = None
    fastest_dense: StepRow | None = None
    together = True
    for variant in variants:
        runner, row = attempt(variant)
        if best is not None and re.search("out of memory|captur", row.error):
            again, best, together = best.variant, None, False
            free()
            alone = attempt(again)[1]
            fastest_dense = alone if alone.step_ms else fastest_dense
            free()
            runner, row = attempt(variant)
        if (step_ms := row.step_ms) is not None:
            if row.dense_ms is None and fastest_dense:
                row = replace(row, dense_ms=fastest_dense.step_ms, dense_further_ms=fastest_dense.further_ms)
            row = replace(row, ratio=row.dense_ms / step_ms if row.dense_ms else None)
            if variant.dense and variant.precision == "bf16" and (not row.dense_ms or step_ms < row.dense_ms):
                best, fastest_dense = runner if together else None, row
        runner = None
        free()
        yield row
    best = None
    torch._dynamo.reset()
    free()


def _further_ms(step_s: float, longer_s: float) -> float:
    return 1e3 * (longer_s - step_s) / (MICRO_BATCHES - 1)


def backends(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """The backends of the two sparse products of each layer; the same layer of all blocks has one entry."""
    rows = {}
    for layer in sparse_kernels.backends(model):
        choices = {"forward": layer.forward, "input_grad": layer.input_grad}
        name = re.sub(r"\d+", "*", layer.name)
        rows[name] = {side: None if choice is None else asdict(choice) for side, choice in choices.items()}
    return rows


def state(case: Case, device: torch.device) -> Iterator[AllocatorRow]:
    """The training state of the dense and the sparse model at the smallest depth."""
    for method in ("dense", "slope"):
        row = AllocatorRow(case=case.name, method=method, depth=case.depths[0])
        try:
            yield measure_state(row, case_config(case, method, case.depths[0]), device)
        except Exception as error:
            yield replace(row, error=one_line(error))
        free()


def measure_state(row: AllocatorRow, config: Config, device: torch.device) -> AllocatorRow:
    """A row with the sizes of a run's weights, gradients, optimizer state and masks."""
    peak = Peak(device)
    model = build(config, device)
    optimizer = optim.build_optimizer(model, config, phases_of(config))
    free()
    peak.restart()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    allocated = peak.above_start()
    tensors = [*store.state_tensors(model, optimizer).values(), *(p.grad for p in parameters)]
    counted = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    parts = account(build_model(run_model_config(config), device="meta"), config).state_bytes
    estimated = sum(size for name, size in parts.items() if not name.startswith("adapters"))
    return replace(row, estimated=estimated, counted=counted, allocated=allocated)


def main(kind: str, *names: str) -> None:
    """Measure on the GPU, and print rows; of "step", "generate" and "products" the last name is a Plan in JSON."""
    plan = from_json(Plan, json.loads(names[-1])) if kind in ("step", "generate", "products") else Plan()
    device = torch.device(plan.device or f"cuda:{torch.cuda.current_device()}")
    # Every variant compiles the code of a block again.
    torch._dynamo.config.recompile_limit = 64
    measures: dict[str, Callable[[], Iterator[Row]]] = {
        "step": lambda: step(cases()[names[0]], device, step_variants(plan.variants)),
        "state": lambda: (row for name in names for row in state(cases()[name], device)),
        "gemm": lambda: gemm([int(name) for name in names]),
        "linearize": lambda: (row for name in names for row in linearize_decoding.rows(name, device)),
        "generate": lambda: (row for name in names[:-1] for row in generate.rows(name, plan, device)),
        "products": lambda: (row for name in names[:-1] for row in products.rows(name, plan, device)),
    }
    with tempfile.TemporaryDirectory() as folder:
        if kind == "gemm":
            os.environ["XDG_CACHE_HOME"] = folder  # do not reuse the times of an earlier process
        for row in measures[kind]():
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

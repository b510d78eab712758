"""What `slope bench` measures on the GPU: whole training steps, the bytes of their state, single products, decoding.

    python -m slope_cli.benchmarks.measure step opt-2.7b
    python -m slope_cli.benchmarks.measure state opt-2.7b gpt2-small
    python -m slope_cli.benchmarks.measure gemm 2560 4096
    python -m slope_cli.benchmarks.measure generate llama-small

One JSON object a line on standard output, as soon as it is known. The bench runs this as a process of its own, so that
a crash of the GPU or a hang costs it one case.
"""

import gc
import json
import os
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor

import sparse_kernels
from slope_cli.benchmarks.machine import one_line
from slope_cli.checkpoint import store
from slope_cli.config import load as configs
from slope_cli.config.schema import Config
from slope_cli.methods import optim, phases
from slope_cli.models import shapes
from slope_cli.models.accounting import account
from slope_cli.models.build import build_model, run_model_config
from slope_cli.models.loss import IGNORED_LABEL
from slope_cli.train.step import Renewal, Step, Taken
from sparse_kernels import autotune, packed

Row = dict[str, Any]

WARM_UP, ROUNDS, ROUND_SECONDS = 4, 7, 0.2
HEAT_SECONDS = 3.0
"""Of steps before they are timed: a cold GPU runs a few per cent faster, until its power limit lowers the clock."""
TOKENS, MORE_TOKENS = 8192, (1024, 2048, 4096, 16384)


@dataclass(frozen=True)
class Case:
    """An entry of cases.yaml."""

    name: str
    seq_len: int
    tokens: int
    depths: tuple[int, ...]
    paper: float | None
    target: float | None
    aim: float | None


def cases() -> dict[str, Case]:
    """All cases by name, the most important first."""
    text = (resources.files("slope_cli.benchmarks") / "cases.yaml").read_text()
    entries = yaml.safe_load(text).items()
    return {name: Case(name=name, **{**entry, "depths": tuple(entry["depths"])}) for name, entry in entries}


def case_config(case: Case, method: str, depth: int | None = None) -> Config:
    """The case's recipe with its batch, without dropout; cut to `depth` blocks, or whole."""
    words = [f"method={method}", "model.dropout=0", f"train.seq_len={case.seq_len}"]
    words += [f"train.micro_batch={case.tokens // case.seq_len}", f"train.tokens_per_step={case.tokens}"]
    if depth is not None:
        words.append(f"model.overrides.num_hidden_layers={depth}")
    return configs.load(case.name, words)


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    name: str
    method: str
    compiled: bool
    graphed: bool


VARIANTS = (
    Variant("dense compiled + graph", "dense", True, True),
    Variant("dense compiled", "dense", True, False),
    Variant("dense eager", "dense", False, False),
    Variant("sparse compiled + graph", "slope", True, True),
    Variant("sparse eager", "slope", False, False),
)


class Runner:
    """A model that takes timed steps on one random batch.

    Attributes:
        peak_bytes: the allocator's peak in its first steps, without what others hold; None on a CPU.
    """

    def __init__(self, case: Case, depth: int, variant: Variant, device: torch.device) -> None:
        self.variant = variant
        self.config = case_config(case, variant.method, depth)
        held = _allocated(device)
        self.model = build(self.config, device)
        optimizer = optim.build_optimizer(self.model, self.config)
        objective = shapes.objective(self.model.config)
        how = {"compiled": variant.compiled, "graphed": variant.graphed}
        dtype = torch.bfloat16 if device.type == "cuda" else None
        self._step = Step(self.model, optimizer, objective, dtype=dtype, clip=self.config.optim.clip, **how)
        self._batch = random_batch(self.config, shapes.vocab_size(self.model.config), objective, device)
        if device.type == "cuda":
            sparse_kernels.prepare(self.model, case.tokens)  # now, so that its measuring is not in the peak
            torch.cuda.reset_peak_memory_stats()
        self._stage, self._steps = phases.stage(self.config, 0), 0
        for _ in range(WARM_UP):
            self.loss = self._take().loss
        self.peak_bytes = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else None

    def seconds(self, calls: int) -> float:
        """Seconds of one of so many steps, mask renewals among them as in a run."""
        return _seconds(self._take, calls)

    def _take(self) -> Taken:
        renews = phases.renews(self.config, self._stage, self._steps)
        self._steps += 1
        return self._step([self._batch], Renewal() if renews else None)


def build(config: Config, device: torch.device) -> Any:
    """The run's model as runmodel.build makes it, but drawn on the device: on a CPU the largest would take minutes."""
    shape = run_model_config(config)
    torch.manual_seed(config.train.seed)
    with torch.device(device):
        model = getattr(transformers, shapes.FAMILIES[shape.model_type].model_class)(shape).train()
    if config.method == "slope":
        s = config.sparsity
        sparse_kernels.sparsify(model, n=s.n, m=s.m, mask=s.mask, seed=config.train.seed, skip=s.skip)
    return model


def random_batch(config: Config, vocab: int, objective: shapes.Objective, device: torch.device) -> dict[str, Tensor]:
    """Random tokens; for "masked" with 15 % of them labelled, and BERT's two other inputs."""
    sides = config.train.micro_batch, config.train.seq_len
    batch = {name: torch.randint(vocab, sides, device=device) for name in ("input_ids", "labels")}
    if objective == "masked":
        unlabelled = torch.rand(sides, device=device) > 0.15
        batch["labels"][unlabelled] = IGNORED_LABEL
        batch["token_type_ids"] = torch.randint(2, sides, device=device)
        batch["next_sentence_label"] = torch.randint(2, sides[:1], device=device)
    return batch


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(work: Callable[[], object], calls: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    _synchronize()
    return (time.perf_counter() - started) / calls


def _free() -> None:
    gc.collect()
    packed.release()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def step(case: Case, device: torch.device, variants: Sequence[Variant] = VARIANTS) -> Iterator[Row]:
    """Rows of all variants at the larger depth, then of the fastest dense and sparse one at the smaller."""
    *smaller, largest = case.depths
    rows = []
    for row in depth_rows(case, largest, variants, device):
        rows.append(row)
        yield row
    for depth in smaller:
        best = [fastest(rows, "dense"), fastest(rows, "slope")]
        chosen = [variant for variant in variants if variant.name in {row["variant"] for row in best if row}]
        yield from depth_rows(case, depth, chosen, device)


def fastest(rows: Sequence[Row], method: str) -> Row | None:
    """The row of the fastest variant of a method, or None if none ran."""
    ran = [row for row in rows if row["method"] == method and not row["error"]]
    return min(ran, key=lambda row: float(row["step_ms"])) if ran else None


def depth_rows(case: Case, depth: int, variants: Sequence[Variant], device: torch.device) -> Iterator[Row]:
    """Time variants in their order, each in alternating rounds with the fastest dense one before it.

    Where the two do not fit into memory together, that variant and those after it are timed alone: "alternated" is
    false, and they are compared with the time that the dense one has when it is made and timed anew, just before.
    """
    best: Runner | None = None
    best_ms, together = 0.0, True
    for variant in variants:
        runner, row = _attempt(case, depth, variant, device, best)
        if best is not None and re.search("out of memory|captur", row["error"]):
            again, best, together = best.variant, None, False
            _free()
            best_ms = _attempt(case, depth, again, device, None)[1]["step_ms"] or best_ms
            _free()
            runner, row = _attempt(case, depth, variant, device, None)
        if not row["error"]:
            dense_ms = row["dense_ms"] or best_ms
            row |= {"dense_ms": dense_ms or None, "ratio": dense_ms / row["step_ms"] if dense_ms else None}
            if variant.method == "dense" and (not dense_ms or row["step_ms"] < dense_ms):
                best, best_ms = runner if together else None, row["step_ms"]
        runner = None
        _free()
        yield row
    del best
    torch._dynamo.reset()
    _free()


def _attempt(
    case: Case, depth: int, variant: Variant, device: torch.device, best: Runner | None
) -> tuple[Runner | None, Row]:
    started = time.perf_counter()
    row: Row = {"case": case.name, "depth": depth, "variant": variant.name, "method": variant.method, "error": ""}
    row |= {"alternated": best is not None, "step_ms": None, "dense_ms": None, "ratio": None}
    try:
        runner = Runner(case, depth, variant, device)
        ms, *dense_ms = alternate([runner] if best is None else [runner, best])
        row |= {"step_ms": ms, "dense_ms": dense_ms[0] if dense_ms else None}
        row |= {"peak_bytes": runner.peak_bytes, "loss": runner.loss, "seconds": time.perf_counter() - started}
        return runner, row | {"backends": backends(runner.model)}
    except Exception as error:  # whatever it is, the other variants go on
        return None, row | {"error": one_line(error)}


def alternate(runners: Sequence[Runner]) -> list[float]:
    """Median milliseconds of a step of each, in alternating rounds, on a GPU that is warm from the same steps."""
    _synchronize()
    end = time.monotonic() + (HEAT_SECONDS if torch.cuda.is_available() else 0.0)
    while time.monotonic() < end:
        for runner in runners:
            runner.seconds(1)
    calls = [max(1, min(20, round(ROUND_SECONDS / runner.seconds(1)))) for runner in runners]
    rounds = [[runner.seconds(n) for runner, n in zip(runners, calls, strict=True)] for _ in range(ROUNDS)]
    return [statistics.median(column) * 1e3 for column in zip(*rounds, strict=True)]


def backends(model: torch.nn.Module) -> dict[str, Row]:
    """How the two sparse products of each layer ran, blocks that are alike as one."""
    found = {}
    for layer in sparse_kernels.backends(model):
        choices = {"forward": layer.forward, "input_grad": layer.input_grad}
        name = re.sub(r"\d+", "*", layer.name)
        found[name] = {side: None if choice is None else asdict(choice) for side, choice in choices.items()}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# State


def state(case: Case, device: torch.device) -> Iterator[Row]:
    """Bytes of weights, gradients, optimizer and positions at the smaller depth: reckoned, counted, and allocated."""
    for method in ("dense", "slope"):
        row: Row = {"case": case.name, "method": method, "depth": case.depths[0], "error": ""}
        try:
            yield row | state_bytes(case_config(case, method, case.depths[0]), device)
        except Exception as error:
            yield row | {"error": one_line(error)}
        _free()


def state_bytes(config: Config, device: torch.device) -> Row:
    """reckoned: by slope_cli.accounting; counted: over live tensors; allocated: the allocator's peak, None on a CPU."""
    held = _allocated(device)
    model = build(config, device)
    optimizer = optim.build_optimizer(model, config)
    _free()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    allocated = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else None
    tensors = [*store.state_tensors(model, optimizer).values(), *(p.grad for p in parameters)]
    shapes = build_model(run_model_config(config), device="meta")
    counts = account(config, phases.plan(config, shapes), shapes)
    found = counts.dense_state_bytes if config.method == "dense" else counts.state_bytes
    return {
        "reckoned": sum(size for name, size in found.items() if not name.startswith("adapters")),
        "counted": sum(tensor.nbytes for tensor in tensors if tensor is not None),
        "allocated": allocated,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Products


def gemm(widths: Sequence[int]) -> Iterator[Row]:
    """The products of a block of each width, first for 8,192 tokens; last, torch's own 2:4 product beside them."""
    from slope_cli.benchmarks.kernels_gpu import products

    for tokens in (TOKENS, *MORE_TOKENS):
        for width in widths:
            try:
                yield from ({"error": "", **row} for row in products(width, tokens, torch.bfloat16))
            except Exception as error:
                yield {"width": width, "tokens": tokens, "error": one_line(error)}
            _free()
        autotune.forget()  # it searches only so many token counts for one matrix
    for width in widths:  # last, since a fault in it would end the process
        for matrix, (rows, columns) in sides(width).items():
            row: Row = {"width": width, "matrix": matrix, "product": "torch", "tokens": TOKENS, "error": ""}
            try:
                yield row | {"torch_ms": torch_semi_structured_ms(rows, columns, TOKENS)}
            except Exception as error:
                yield row | {"error": one_line(error)}


def sides(width: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the four matrices of a block."""
    return {"qkv": (3 * width, width), "proj": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}


def torch_semi_structured_ms(rows: int, columns: int, tokens: int) -> float:
    """Milliseconds of a forward product by torch.sparse.to_sparse_semi_structured, called eagerly, as it must be."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    pattern = torch.tensor([1, 1, 0, 0], **options).repeat(rows, columns // 4)
    X, bias = torch.randn(tokens, columns, **options), torch.randn(rows, **options)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        W = torch.sparse.to_sparse_semi_structured(torch.randn(rows, columns, **options) * pattern)
        torch.nn.functional.linear(X, W, bias)
        return statistics.median(_seconds(lambda: torch.nn.functional.linear(X, W, bias), 10) for _ in range(5)) * 1e3


def main(words: Sequence[str]) -> None:
    """Measure what the words say, on the GPU, and print rows."""
    kind, *names = words
    device = torch.device("cuda", torch.cuda.current_device())
    # Every variant is another compilation of the same code of a block.
    torch._dynamo.config.recompile_limit = 64
    with tempfile.TemporaryDirectory() as folder:
        if kind == "gemm":
            os.environ["XDG_CACHE_HOME"] = folder  # the times of an earlier process are no measurement
            rows: Iterator[Row] = gemm([int(name) for name in names])
        elif kind == "generate":
            from slope_cli.benchmarks import generate

            rows = (row for name in names for row in generate.rows(name, device))
        else:
            measure = {"step": step, "state": state}[kind]
            rows = (row for name in names for row in measure(cases()[name], device))
        for row in rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

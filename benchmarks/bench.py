"""`slope bench`: training steps, single products and memory, sparse against dense; generating text by the engine; and
decoding with linearized against softmax attention.

All work on the GPU runs in separate processes (measure.py), one per case, so that a crash, a hang or a full memory
costs only one case. Results are written to the output folder after every row, to a JSON file for each kind, and at the
end bench.md, and speed.png and .svg.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from slope_cli.errors import SlopeError, UsageError, did_you_mean
from slope_cli.methods.accounting import account
from slope_cli.models.build import build_model, model_config, run_model_config
from slope_cli.utils.files import write_json
from slope_cli.utils.typed_json import from_json
from sparse_kernels import children
from sparse_kernels.formats import BF16

from . import generate, linearize_decoding, products, records, report
from .measure import case_config, step_variants
from .records import (
    AllocatorRow,
    Bytes,
    Case,
    CaseResult,
    DecodeRow,
    GemmRow,
    GenerateRow,
    Plan,
    ProductRow,
    StepRow,
)

KINDS = ("all", "step", "gemm", "memory", "generate", "products", "linearize")
DEFAULT = {"generate": generate.DEFAULT, "products": products.DEFAULT, "linearize": linearize_decoding.DEFAULT}
"""The models of the kinds that have no cases."""
Row = TypeVar("Row", StepRow, AllocatorRow, GemmRow, DecodeRow, GenerateRow, ProductRow)

LONGEST = 1800.0
"""Seconds after which a case without a budget is taken to hang."""


def run(
    what: str,
    names: Sequence[str] = (),
    out: Path | None = None,
    budget: float | None = None,
    plan: Plan | None = None,
) -> records.BenchResults:
    """Measure, and write the results.

    Args:
        what: one of KINDS. Without a GPU "all" is "memory", which is then estimated, and "linearize" estimates that of
            decoding; "step" and "gemm" are refused, and "generate" and "products" without a plan for the CPU.
        names: cases, or for a kind of DEFAULT models; by default all. "all" of named cases has no kind of DEFAULT.
        out: the folder; by default a new one in the current folder.
        budget: seconds, after which the remaining measurements are listed as not run.
        plan: of "generate", "products" and "step"; None for the usual one.

    Raises:
        UsageError: an unknown measurement or name, a plan that does not fit, or a folder that cannot be written.
    """
    if what not in KINDS:
        raise UsageError(f"{what}: choose one of {', '.join(KINDS)}")
    chosen, plan = choose([] if what in DEFAULT else names), plan or Plan()
    models = {kind: names if names and kind == what else usual for kind, usual in DEFAULT.items()}
    gpu = torch.cuda.is_available()
    _refuse(what, models, plan, gpu)
    folder = out or _new_folder(gpu)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}") from None
    bench = Bench(folder, chosen, budget)
    if not gpu and what == "all":
        bench.say("no GPU here: training steps and products cannot be measured; memory is estimated from the shapes")
        what = "memory"
    if what in ("all", "memory"):
        bench.memory()
    if what in ("all", "step"):
        bench.steps(plan.variants if what == "step" else ())
    if what in ("all", "gemm"):
        bench.gemm()
    if what in ("all", "memory") and gpu:
        bench.allocator()
    if what == "generate" or (what == "all" and not names):
        bench.generate(models["generate"], plan)
    if what == "products" or (what == "all" and not names):
        bench.products(models["products"], plan)
    if what == "linearize" or (what == "all" and not names):
        bench.linearize(models["linearize"], gpu)
    report.write(bench.results, folder)
    return bench.results


def _refuse(what: str, models: dict[str, Sequence[str]], plan: Plan, gpu: bool) -> None:
    """UsageError now for what would fail later: a wrong name, a plan that does not fit, no GPU."""
    own = Plan(variants=plan.variants) if what == "step" else Plan()
    if what not in ("all", "generate", "products") and plan != own:
        options = "--cases, --out, --budget" + ", --variants" * (what == "step")
        raise UsageError(f"{what}: has no options but {options}; the others are of generate and products")
    if what in ("step", "gemm") and not gpu:
        raise UsageError(f"no GPU here: {what} cannot be measured; slope bench memory estimates from the shapes")
    if what in ("generate", "products") and not gpu and plan.device != "cpu":
        raise UsageError(f"no GPU here: {what} cannot be measured; --device cpu measures plain torch on this processor")
    if what == "step":
        step_variants(plan.variants)
    elif what == "generate":
        for name in models[what]:
            generate.model_entry(name, plan)
    elif what == "products":
        for name in models[what]:
            products.matrices(name)
    elif what in ("all", "linearize"):
        for name in models["linearize"]:
            linearize_decoding.subject(name)


def choose(names: Sequence[str]) -> list[Case]:
    """The cases of these names, in the order of cases.yaml; all for no names; UsageError for an unknown one."""
    known = records.cases()
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{unknown[0]}: no case of this name; {did_you_mean(unknown[0], known)}")
    return [case for name, case in known.items() if not names or name in names]


def _new_folder(gpu: bool) -> Path:
    """bench-<gpu>-<date> in the current folder, with a number if it exists already."""
    where = torch.cuda.get_device_name().lower().replace(" ", "-") if gpu else "cpu"
    name = f"bench-{where}-{time.strftime('%Y-%m-%d')}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in map(Path, names) if not folder.exists())


class Bench:
    """The parts of a bench, which share the cases, the remaining time, and the results."""

    def __init__(self, folder: Path, chosen: Sequence[Case], budget: float | None) -> None:
        self.results = records.BenchResults(folder=str(folder))
        self._folder, self._chosen = folder, chosen
        self._end = None if budget is None else time.monotonic() + budget

    def say(self, text: str) -> None:
        """Log a line."""
        print(text, file=sys.stderr, flush=True)

    def memory(self) -> None:
        """Estimate the bytes of every whole model from its shapes."""
        self.results.memory = records.MemoryResults(cases=[memory_row(case) for case in self._chosen])
        self._write("memory")

    def allocator(self) -> None:
        """Measure the training state of models that are cut to fit."""
        memory, arguments = self.results.memory, ["state", *(case.name for case in self._chosen)]
        assert memory is not None
        for row in self._rows(AllocatorRow, arguments, "memory", memory):
            memory.allocator.append(row)

    def steps(self, variants: tuple[str, ...] = ()) -> None:
        """Measure whole training steps of every case, of these variants or of all."""
        plan = json.dumps(asdict(Plan(variants=variants)))
        self.results.step = records.StepResults()
        for case in self._chosen:
            config = case_config(case, "dense")
            model = build_model(run_model_config(config), device="meta")
            operations = account(model, config).dense_flops_per_token
            entry = CaseResult(**vars(case), blocks=model.config.num_hidden_layers, flops_per_token=operations)
            self.results.step.cases.append(entry)
            for row in self._rows(StepRow, ["step", case.name, plan], "step", entry):
                entry.rows.append(row)
                entry.summary = entry.compared(dense=False, precision="bf16")
                ratio = "" if row.ratio is None else f", {row.ratio:.3f} times the best dense speed"
                text = row.error or f"{row.step_ms:.2f} ms{ratio}"
                self.say(f"{row.case}, {row.depth} blocks, {row.variant}: {text}")
            if entry.not_run:
                self.say(f"{case.name}: {entry.not_run}")
            report.write(self.results, self._folder)

    def gemm(self) -> None:
        """Measure the products of a block of every width among the cases."""
        self.results.gemm = results = records.GemmResults()
        widths = dict.fromkeys(str(model_config(case.name).hidden_size) for case in self._chosen)
        for row in self._rows(GemmRow, ["gemm", *widths], "gemm", results):
            results.rows.append(row)
        self.say("; ".join(filter(None, (f"products: {len(results.rows)} measured", results.not_run))))

    def generate(self, names: Sequence[str], plan: Plan) -> None:
        """Measure the engine with each model."""
        self.results.generate = records.GenerateResults(plan=plan)
        for name in names:
            entry = generate.model_entry(name, plan)
            self.results.generate.models.append(entry)
            for row in self._rows(GenerateRow, ["generate", name, json.dumps(asdict(plan))], "generate", entry):
                entry.rows.append(row)
                found = [] if row.step_ms is None else [f"{row.step_ms:.2f} ms"]
                found += [] if row.ratio is None else [f"{row.ratio:.3f} times dense"]
                self.say(f"{name}, {row.part}, batch {row.batch}, {row.variant}: {row.error or ', '.join(found)}")
            if entry.not_run:
                self.say(f"{name}: {entry.not_run}")
            report.write(self.results, self._folder)

    def products(self, names: Sequence[str], plan: Plan) -> None:
        """Measure the products of each model's block for few tokens."""
        self.results.products = results = records.ProductResults(plan=plan)
        for row in self._rows(ProductRow, ["products", *names, json.dumps(asdict(plan))], "products", results):
            results.rows.append(row)
            place = f"{row.model}, {row.matrix} {row.rows} x {row.columns}, {row.tokens} tokens"
            self.say(f"{place}: {row.error or f'{row.ratio:.3f} times dense'}")

    def linearize(self, subjects: Sequence[str], gpu: bool) -> None:
        """Estimate memory of linearized decoding (see `linearize_decoding.subject`), and measure it on a GPU."""
        self.results.linearize = records.LinearizeResults()
        if not gpu:
            self.say("no GPU here: decoding cannot be timed; its memory is estimated from the shapes")
        for name in subjects:
            memory = linearize_decoding.memory_row(linearize_decoding.subject(name))
            entry = records.ModelResult(memory=memory, not_run="not run: no GPU")
            self.results.linearize.models.append(entry)
            self._write("linearize")
            for row in self._rows(DecodeRow, ["linearize", name], "linearize", entry) if gpu else ():
                entry.rows.append(row)
                where = " ".join(str(value) for value in (row.part, row.side, row.batch, row.length) if value)
                speed = row.tokens_per_s and f"{row.tokens_per_s:,.0f} tokens/s"
                self.say(": ".join(filter(None, (f"{row.model}, {where}", speed or row.error))))
            if gpu:
                self.say("; ".join(filter(None, (f"{name}: {len(entry.rows)} measured", entry.not_run))))
            report.write(self.results, self._folder)

    def _rows(self, kind: type[Row], arguments: Sequence[str], part: str, results: records.Incomplete) -> Iterator[Row]:
        """Measure in a separate process, record why rows are missing, and write the part's file."""
        left = LONGEST if self._end is None else self._end - time.monotonic()
        results.not_run = "" if left > 0 else "not run: the budget was spent"
        try:
            for row in measured(arguments, left) if left > 0 else ():
                yield from_json(kind, row)
                self._write(part)  # with the row, which the caller has added
        except SlopeError as error:
            results.not_run = str(error)
        self._write(part)

    def _write(self, part: str) -> None:
        write_json(self._folder / f"{part}.json", asdict(getattr(self.results, part)))


def measured(arguments: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """The rows that measure.py prints in a separate process.

    Raises:
        SlopeError: it failed or timed out; the rows printed before are yielded.
    """
    work = "from slope_cli.benchmarks.measure import main; main(*sys.argv[1:])"
    command, environment = children.python(work, arguments)
    # A process group of its own, so that torch's compile workers are killed too: they would hold the pipe open.
    started: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=environment, **started) as process:
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in process.stdout:
                try:
                    yield dict(json.loads(line))
                except ValueError:
                    print(line, end="", file=sys.stderr)
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
    if late.is_set():
        raise SlopeError(f"stopped after {seconds:.0f} s")
    if code:
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        raise SlopeError(f"the measuring process ended with {how}")


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def memory_row(case: Case) -> records.MemoryRow:
    """The bytes of a whole model, sparse and dense; nothing is allocated."""
    config = case_config(case, "slope")
    model = build_model(run_model_config(config), device="meta")
    counts = account(model, config)
    sparse_weights = counts.pruned_layer_weights
    packed = BF16.packed_bytes(1, sparse_weights)
    adapters = Bytes(counts.state_bytes["adapters with their state"], counts.adapter_parameters * 2)
    dense = Bytes(sum(counts.dense_state_bytes.values()), counts.dense_parameters * 2, counts.linear_weights * 2)
    inference = dense.inference - sparse_weights * 2 + packed
    state = sum(counts.state_bytes.values()) - adapters.state
    sparse = Bytes(state, inference, copies=dense.copies - sparse_weights * 2 + 2 * packed)  # for two products
    return records.MemoryRow(
        case=case.name,
        parameters=counts.dense_parameters,
        in_sparse_layers=sparse_weights,
        dense=dense,
        sparse=sparse,
        adapters=adapters,
        state_ratio=sparse.state / dense.state,
        state_ratio_with_adapters=(sparse.state + adapters.state) / dense.state,
        state_and_copies_ratio=(sparse.state + sparse.copies) / (dense.state + dense.copies),
        inference_ratio=sparse.inference / dense.inference,
        inference_ratio_with_adapters=(sparse.inference + adapters.inference) / dense.inference,
    )

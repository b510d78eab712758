"""The program behind `slope bench`: training steps, single products and memory, sparse against dense; and decoding,
linearized attention against softmax attention.

Everything that touches the GPU runs in processes of its own (measure.py), a case each, so that a crash, a hang or a
full memory costs one case. Results are written to the output folder after every row: memory.json, step.json, gemm.json
and generate.json, each with the hardware and versions it was measured on, bench.md, and speed.png and .svg.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from slope_cli.benchmarks import generate, report
from slope_cli.benchmarks.machine import machine, one_line
from slope_cli.benchmarks.measure import Case, Row, case_config, cases, fastest
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import phases
from slope_cli.models.accounting import account
from slope_cli.models.build import build_model, model_config, run_model_config
from slope_cli.models.shapes import width
from slope_cli.utils.environment import gpu_libraries
from slope_cli.utils.files import atomic_file

KINDS = ("all", "step", "gemm", "memory", "generate")
Measure = Callable[[Sequence[str], float], Iterator[Row]]

_LONGEST = 1800.0
"""Seconds of one case without a budget: beyond them it hangs."""


def run(what: str, names: Sequence[str] = (), out: Path | None = None, budget: float | None = None) -> Row:
    """Measure, and write the results.

    Args:
        what: one of KINDS; without a GPU only the memory is reckoned, that of decoding for "generate", else that of
            training.
        names: of cases, or for "generate" of what `generate.subject` takes; none for all of them. "all" of named cases
            has no decoding.
        out: the folder; by default a new one in the current folder.
        budget: seconds after which what is still to do is listed as not run.

    Returns:
        "folder", and a section for each part, as in the files.

    Raises:
        UsageError: an unknown word or case, or a folder that cannot be written.
    """
    if what not in KINDS:
        raise UsageError(f"{what}: choose one of {', '.join(KINDS)}")
    chosen = choose([] if what == "generate" else names)
    words = names if names and what == "generate" else generate.DEFAULT
    for word in words:
        generate.subject(word)  # what is wrong with it is to be said now
    gpu = torch.cuda.is_available()
    folder = out or _new_folder(gpu)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}") from None
    bench = Bench(folder, chosen, budget)
    if not gpu and what != "generate":
        bench.say("no GPU here: training steps and products cannot be measured; memory is reckoned from the shapes")
        what = "memory"
    if what in ("all", "memory"):
        bench.memory()
    if what in ("all", "step"):
        bench.steps()
    if what in ("all", "gemm"):
        bench.gemm()
    if what in ("all", "memory") and gpu:
        bench.state()
    if what == "generate" or (what == "all" and not names):
        bench.generate(words, gpu)
    report.write(bench.result, folder)
    return {"folder": str(folder), **bench.result}


def choose(names: Sequence[str]) -> list[Case]:
    """The cases of these names, in the order of cases.yaml; all for no names; UsageError for an unknown one."""
    known = cases()
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{unknown[0]}: no case of this name; known are {', '.join(known)}")
    return [case for name, case in known.items() if not names or name in names]


def _new_folder(gpu: bool) -> Path:
    """bench-<gpu>-<date> in the current folder, with a number if it is there already."""
    where = torch.cuda.get_device_name().lower().replace(" ", "-") if gpu else "cpu"
    name = f"bench-{where}-{time.strftime('%Y-%m-%d')}"
    folder, number = Path(name), 1
    while folder.exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return folder


class Bench:
    """What the parts share: the cases, the time left, and the results so far."""

    def __init__(self, folder: Path, chosen: Sequence[Case], budget: float | None) -> None:
        self.result: Row = {}
        self._folder, self._chosen = folder, chosen
        self._end = None if budget is None else time.monotonic() + budget
        self._measure: Measure = measured

    def left(self) -> float:
        """Seconds that the next case may take."""
        return _LONGEST if self._end is None else self._end - time.monotonic()

    def say(self, text: str) -> None:
        """A line of the log."""
        print(text, file=sys.stderr, flush=True)

    def _section(self, name: str, **content: Any) -> Row:
        self.result[name] = {"machine": machine(), "libraries": gpu_libraries(), **content}
        return dict(self.result[name])

    def _write(self, name: str) -> None:
        with atomic_file(self._folder / f"{name}.json") as file:
            file.write((json.dumps(self.result[name], indent=1) + "\n").encode())

    def _rows(self, words: Sequence[str], keep: Callable[[Row], None]) -> str:
        """Hand every measured row to `keep`; returns why not all were measured, or nothing."""
        if self.left() <= 0:
            return "not run: the budget was spent"
        try:
            for row in self._measure(words, self.left()):
                keep(row)
        except SlopeError as error:
            return str(error)
        return ""

    def memory(self) -> None:
        """Bytes of every whole model, reckoned from its shapes."""
        rows: list[Row] = []
        self._section("memory", cases=rows, allocator=[], not_run="")
        for case in self._chosen:
            try:
                rows.append(memory_row(case))
            except Exception as error:
                rows.append({"case": case.name, "error": one_line(error)})
        self._write("memory")

    def state(self) -> None:
        """Beside it, what the GPU's allocator says of models that are cut to fit."""
        section = self.result["memory"]

        def keep(row: Row) -> None:
            section["allocator"].append(row)
            self._write("memory")

        section["not_run"] = self._rows(["state", *(case.name for case in self._chosen)], keep)
        self._write("memory")

    def steps(self) -> None:
        """Whole training steps of every case."""
        entries: list[Row] = []
        self._section("step", cases=entries)
        for case in self._chosen:
            config = run_model_config(case_config(case, "dense"))
            entry = {**asdict(case), "blocks": config.num_hidden_layers, "rows": [], "summary": None, "not_run": ""}
            entries.append(entry)
            entry["not_run"] = self._rows(["step", case.name], lambda row, entry=entry: self._keep_step(entry, row))  # type: ignore[misc]
            if entry["not_run"]:
                self.say(f"{case.name}: {entry['not_run']}")
            self._write("step")
            report.write(self.result, self._folder)

    def _keep_step(self, entry: Row, row: Row) -> None:
        entry["rows"].append(row)
        entry["summary"] = summary(entry)
        ratio = "" if row["ratio"] is None else f", {row['ratio']:.3f} times the best dense speed"
        text = row["error"] or f"{row['step_ms']:.2f} ms{ratio}"
        self.say(f"{row['case']}, {row['depth']} blocks, {row['variant']}: {text}")
        self._write("step")

    def gemm(self) -> None:
        """The products of a block of every width among the cases."""
        widths = list(dict.fromkeys(str(width(model_config(case.name))) for case in self._chosen))
        rows: list[Row] = []
        self._section("gemm", rows=rows, not_run="")

        def keep(row: Row) -> None:
            rows.append(row)
            self._write("gemm")

        self.result["gemm"]["not_run"] = reason = self._rows(["gemm", *widths], keep)
        self.say(f"products: {len(rows)} measured{reason and f'; {reason}'}")
        self._write("gemm")

    def generate(self, words: Sequence[str], gpu: bool) -> None:
        """Decoding by linearized and by softmax attention: bytes from the shapes, all else on the GPU."""
        entries: list[Row] = []
        self._section("generate", models=entries)
        if not gpu:
            self.say("no GPU here: decoding cannot be timed; what it remembers is reckoned from the shapes")
        for word in words:
            entry: Row = {
                "memory": generate.memory_row(generate.subject(word)),
                "rows": [],
                "not_run": "not run: no GPU",
            }
            entries.append(entry)
            if gpu:
                entry["not_run"] = self._rows(
                    ["generate", word], lambda row, entry=entry: self._keep_decoding(entry, row)
                )  # type: ignore[misc]
                self.say(f"{word}: {len(entry['rows'])} measured{entry['not_run'] and '; ' + entry['not_run']}")
            self._write("generate")
            report.write(self.result, self._folder)

    def _keep_decoding(self, entry: Row, row: Row) -> None:
        entry["rows"].append(row)
        where = " ".join(str(row[key]) for key in ("part", "side", "batch", "length") if key in row)
        speed = f": {row['tokens_per_s']:,.0f} tokens a second" if "tokens_per_s" in row else ""
        self.say(f"{row['model']}, {where}{speed or (row['error'] and ': ' + row['error'])}")
        self._write("generate")


def measured(words: Sequence[str], seconds: float) -> Iterator[Row]:
    """The rows that measure.py prints in a process of its own.

    Raises:
        SlopeError: it failed, or did not end in time; what it had printed was yielded.
    """
    command = [sys.executable, "-m", "slope_cli.benchmarks.measure", *words]
    # A group of its own: torch's compile workers must go with it, or they would hold the pipe open.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), _kill(process)))
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


def summary(entry: Row) -> Row | None:
    """The fastest sparse variant of a case against the fastest dense one in the same rounds; None if one is missing.

    ratio: of the model as it was timed. A case timed at two depths has the milliseconds of a block, too, and
    extrapolated_*: the timed step plus the blocks that the whole model has more. Not where one depth was timed in
    alternating rounds and the other was not: their difference is no block's.
    """
    by_depth = [[row for row in entry["rows"] if row["depth"] == depth] for depth in sorted(entry["depths"])]
    sparse = [fastest(rows, "slope") for rows in by_depth]
    last = sparse[-1]
    if last is None or last["dense_ms"] is None:
        return None
    dense = fastest(by_depth[-1], "dense")
    found: Row = {"depth": last["depth"], "dense": dense and dense["variant"], "sparse": last["variant"]}
    found |= {"dense_ms": last["dense_ms"], "sparse_ms": last["step_ms"], "ratio": last["ratio"]}
    first = sparse[0]
    if len(sparse) < 2 or first is None or first["dense_ms"] is None or first["alternated"] != last["alternated"]:
        return found
    more = entry["blocks"] - last["depth"]
    for side, key in (("dense", "dense_ms"), ("sparse", "step_ms")):
        block = (last[key] - first[key]) / (last["depth"] - first["depth"])
        found |= {f"{side}_block_ms": block, f"extrapolated_{side}_ms": last[key] + more * block}
    found["block_ratio"] = found["dense_block_ms"] / found["sparse_block_ms"]
    found["extrapolated_ratio"] = found["extrapolated_dense_ms"] / found["extrapolated_sparse_ms"]
    return found


def memory_row(case: Case) -> Row:
    """Bytes of training state and of inference weights of a whole model, sparse and dense; nothing is allocated.

    state: float32 weights, gradients and AdamW moments, and the positions' bits. copies: what the products read in 16
    bits: of a dense layer its cast, of a sparse one values and metadata of both W^R and W^{R,C} (9/16 of dense each).
    inference: 16-bit weights, sparse layers packed.
    """
    config = case_config(case, "slope")
    model = build_model(run_model_config(config), device="meta")
    layers = phases.plan(config, model)
    counts = account(config, layers, model)
    assert layers is not None
    pruned = sum(layer.out_features * layer.in_features for layer in layers.swapped)
    kept_dense = sum(layer.out_features * layer.in_features for layer in layers.skipped)
    adapters = counts.state_bytes["adapters with their state"]
    state, dense_state = sum(counts.state_bytes.values()) - adapters, sum(counts.dense_state_bytes.values())
    copies, dense_copies = pruned * 2 * 9 // 8 + kept_dense * 2, (pruned + kept_dense) * 2
    inference, dense_inference = (counts.dense_parameters - pruned) * 2 + pruned * 9 // 8, counts.dense_parameters * 2
    return {
        "case": case.name,
        "error": "",
        "parameters": counts.dense_parameters,
        "in_sparse_layers": pruned,
        "dense": {"state": dense_state, "copies": dense_copies, "inference": dense_inference},
        "sparse": {"state": state, "copies": copies, "inference": inference},
        "adapters": {"state": adapters, "inference": counts.adapter_parameters * 2},
        "state_ratio": state / dense_state,
        "state_ratio_with_adapters": (state + adapters) / dense_state,
        "state_and_copies_ratio": (state + copies) / (dense_state + dense_copies),
        "inference_ratio": inference / dense_inference,
        "inference_ratio_with_adapters": (inference + counts.adapter_parameters * 2) / dense_inference,
    }

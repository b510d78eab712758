"""Which kernel runs a product: searched, checked and timed against dense once for each shape, and kept on disk."""

import contextlib
import fcntl
import functools
import json
import math
import os
import re
import stat
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import children, cuda, cusparselt, driver
from sparse_kernels.cusparselt import CuSparseLtError
from sparse_kernels.formats import FORMATS
from sparse_kernels.matmul_plan import MatmulPlan, MatmulShape, compress, random_mask
from sparse_kernels.operands import Operand, product

# Below these no search is made: the product is too small to gain, and with few rows an algorithm has hung.
SMALLEST_SIDE, FEWEST_TOKENS = 512, 256
# Token counts that are searched for one matrix; further ones run dense, so that a run with many batch shapes does not
# keep searching.
_MOST_TOKEN_COUNTS = 8
_FORMAT = 1
_LARGEST_FILE = 1 << 24
_FAILED = "failed in a trial process"
# How a kernel ends a process that would end it again: an error of the GPU's code, or SIGILL, SIGFPE, SIGSEGV.
_BROKEN_KERNEL = re.compile(r"illegal (instruction|memory access|address)|misaligned address|exit -(4|8|11)$")
# Not initialized, allocation failed, mapping error, execution failed, internal error, insufficient resources.
_PASSING_STATUS = re.compile(r"failed with status (1|2|5|6|7|11):")


@dataclass(frozen=True)
class Choice:
    """Whether a product runs sparse, why, and what was measured (milliseconds of one product; None: not measured)."""

    sparse: bool
    reason: str
    sparse_ms: float | None = None
    dense_ms: float | None = None
    algorithm: dict[str, int] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing

_CHOSEN: dict[tuple[MatmulShape, int], tuple[Choice, MatmulPlan | None]] = {}
_GIVEN: dict[str, Choice] = {}


def choose(shape: MatmulShape, device_index: int) -> tuple[Choice, MatmulPlan | None]:
    """Sparse or dense for this product on this device, decided once: in this process, and on disk for the next.

    The file keeps the decision and the times, so that dense winners cost the next process nothing. A sparse winner is
    searched and checked again (on an H100 0.05 s for small matrices, 3 s for the largest), because an algorithm that
    was set by its number has crashed the library.

    Returns:
        the choice, and a plan wherever one passed its check (also where dense is faster).

    Raises:
        RuntimeError: a new shape is met while a CUDA graph is being captured.
    """
    key = shape, device_index
    if key not in _CHOSEN:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"run one step before capturing a CUDA graph: {shape} has not been measured yet")
        _CHOSEN[key] = _choose(shape, device_index)
    return _CHOSEN[key]


def plan_for(shape: MatmulShape, device_index: int) -> MatmulPlan | None:
    """A plan wherever one is possible, even where dense was faster: for a matrix that is packed already."""
    choice, plan = choose(shape, device_index)
    if plan is None and choice.sparse_ms is not None:  # the file said dense, so no plan was made
        _, plan = _measure(shape, device_index, choice)
        _CHOSEN[shape, device_index] = choice, plan
    return plan


def forget() -> None:
    """Forget the choices of this process, and those it was given; the file stays."""
    _CHOSEN.clear()
    _GIVEN.clear()


def kernel_choices() -> dict[str, dict[str, Any]]:
    """The decisions of this process, as JSON, by GPU model, versions and product: for `use_choices` in another one.

    Not those that follow from a shape alone, or from a missing library.
    """
    found = {key: asdict(choice) for key, choice in _GIVEN.items()}
    for (shape, device_index), (choice, _) in _CHOSEN.items():
        if not refusal(shape):
            with contextlib.suppress(CuSparseLtError):
                found[_key(shape, device_index)] = asdict(choice)
    return found


def use_choices(choices: Mapping[str, Any]) -> None:
    """Decide from now on as another process did, whatever would be measured here, so that both run the same kernels.

    This includes products that were decided before, but not matrices that are packed already. Choices for another GPU
    model or other versions of the libraries have no effect. Sparse or dense is taken over, and of a sparse product not
    which of the library's algorithms: that is searched here, and one that fails its check runs dense all the same.

    Args:
        choices: what `kernel_choices` returned.

    Raises:
        ValueError: it is not that.
    """
    try:
        given = {str(key): _parse(entry) for key, entry in choices.items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not choices of kernels: {error}") from error
    _GIVEN.update(given)
    for (shape, device_index), (choice, _) in [*_CHOSEN.items()]:
        with contextlib.suppress(CuSparseLtError):
            if not refusal(shape) and _GIVEN.get(_key(shape, device_index), choice).sparse != choice.sparse:
                del _CHOSEN[shape, device_index]


def _choose(shape: MatmulShape, device_index: int) -> tuple[Choice, MatmulPlan | None]:
    if reason := refusal(shape):
        return Choice(False, reason), None
    try:
        key = _key(shape, device_index)
    except CuSparseLtError as error:
        warn_once(str(error))
        return Choice(False, str(error)), None
    sides, given = (shape.rows, shape.columns), _GIVEN.get(key)
    searched = [known for (known, _), (choice, _) in _CHOSEN.items() if choice.sparse_ms is not None]
    if given is None and sum((known.rows, known.columns) == sides for known in searched) >= _MOST_TOKEN_COUNTS:
        return Choice(False, "too many different token counts to search them all"), None
    known = given or saved_choices().get(key)
    if known is not None and not known.sparse:
        return known, None
    choice = known
    if choice is None and shape.dtype == torch.float16:
        choice = _measure_in_a_process(shape, device_index)
    plan = None
    if choice is None or choice.sparse:
        choice, plan = _measure(shape, device_index, choice)
    if given is None and choice != known and _lasting(choice):
        save_choice(key, choice)
    return choice, plan


def _lasting(choice: Choice) -> bool:
    """Whether the next process would find the same: not so after a time-out, or where memory was full."""
    if choice.reason.startswith(_FAILED):
        return bool(_BROKEN_KERNEL.search(choice.reason))
    return not _PASSING_STATUS.search(choice.reason)


def refusal(shape: MatmulShape) -> str:
    """Why a shape is not worth a search; empty if it is."""
    form = FORMATS[shape.dtype]
    if shape.tokens % form.tokens or shape.rows % form.sides or shape.columns % form.sides:
        return f"sides are not multiples of {form.sides} and tokens not of {form.tokens}"
    if min(shape.rows, shape.columns) < SMALLEST_SIDE:
        return f"a side is below {SMALLEST_SIDE}"
    if shape.tokens < FEWEST_TOKENS:
        return f"fewer than {FEWEST_TOKENS} tokens"
    return ""


def _measure_in_a_process(shape: MatmulShape, device_index: int) -> Choice:
    """The choice of `_measure`, made in a process of its own.

    For float16, because some of its algorithms are illegal instructions on some shapes (cuSPARSELt 0.8.0, H100), and
    the first of those ends a process's use of the GPU.
    """
    request = json.dumps([shape.rows, shape.columns, shape.tokens, shape.bias, device_index])
    command, environment = children.python("from sparse_kernels import kernel_choice; kernel_choice.trial()", [request])
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if result.returncode == 0:
            return Choice(**json.loads(result.stdout.splitlines()[-1]))
        reason = next((line for line in result.stderr.splitlines() if "Error" in line), f"exit {result.returncode}")
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError) as error:
        reason = str(error)
    return Choice(False, f"{_FAILED}: {reason}")


def trial() -> None:
    """The body of that process: measure the shape that the command line gives, and print the choice as JSON."""
    rows, columns, tokens, bias, device_index = json.loads(sys.argv[1])
    choice, _ = _measure(MatmulShape(rows, columns, tokens, torch.float16, bias), device_index, None)
    torch.cuda.synchronize()
    print(json.dumps(asdict(choice)))


@torch.no_grad()
def _measure(shape: MatmulShape, device_index: int, known: Choice | None) -> tuple[Choice, MatmulPlan | None]:
    """Search, check and time on random operands; of a shape whose times are known, search and check."""
    with torch.cuda.device(device_index):
        packed, dense_RC, X_BC, bias_R = random_operands(shape, device_index)
        try:
            plan = MatmulPlan(shape, device_index)
            algorithm = plan.search(packed, X_BC, bias_R)
        except CuSparseLtError as error:
            return Choice(False, str(error)), None
        if not _agrees(plan, packed, dense_RC, X_BC, bias_R):
            return Choice(False, "cuSPARSELt's product differs from the dense one", algorithm=algorithm), None
        if known is not None:
            return Choice(known.sparse, known.reason, known.sparse_ms, known.dense_ms, algorithm), plan
        sparse_ms, dense_ms = graph_ms(
            lambda: plan.matmul(packed, X_BC, bias_R), lambda: dense(X_BC, dense_RC, bias_R), calls=_calls(shape)
        )
        wins = sparse_ms < dense_ms
        reason = f"{dense_ms / sparse_ms:.2f} times the speed of dense"
        return Choice(wins, reason, sparse_ms, dense_ms, algorithm), plan


def random_operands(shape: MatmulShape, device_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A random 2:4 matrix, packed as a layer's (slot markers, then values in place) and dense; random X and bias."""
    device = torch.device("cuda", device_index)
    generator = torch.Generator(device).manual_seed(0)  # not the global one, whose state belongs to the run

    form = FORMATS[shape.dtype]

    def normal(*sides: int, dtype: torch.dtype = form.result) -> Tensor:
        return torch.randn(sides, dtype=dtype, device=device, generator=generator)

    row_bits = random_mask(shape.rows, shape.columns, generator)
    packed = compress(cuda.slot_markers(row_bits, shape.dtype))
    dense_RC = torch.empty(shape.rows, shape.columns, dtype=shape.dtype, device=device)
    values = normal(shape.rows, shape.columns // 2, dtype=torch.float32 if form.scaled else shape.dtype)
    unused, factor = row_bits.view(shape.columns // 8, shape.rows), torch.ones((), device=device)
    for w in (form.values(packed, shape.rows, shape.columns), dense_RC):
        cuda.launch(cuda.refresh(values, row_bits, unused, w=w, factor=factor))
    X_BC = normal(shape.tokens, shape.columns).to(shape.dtype)
    return packed, dense_RC, X_BC, normal(shape.rows) if shape.bias else None


def dense(X_BC: Tensor, A_RC: Tensor, bias_R: Tensor | None = None) -> Tensor:
    """X · A^T + bias by cuBLAS, of operands of a format's dtype; in fp8 without their scales."""
    form = FORMATS[X_BC.dtype]
    one = torch.ones((), device=X_BC.device) if form.scaled else None
    return product(Operand(X_BC, one), Operand(A_RC, one), bias_R, dtype=form.result)  # [B,C] · [R,C]^T -> [B,R]


def _agrees(plan: MatmulPlan, packed: Tensor, dense_RC: Tensor, X_BC: Tensor, bias_R: Tensor | None) -> bool:
    """Twice, because an algorithm has been seen to be wrong only now and then; with a bias, from two addresses."""
    for bias in (bias_R, None if bias_R is None else bias_R.flip(0)):
        expected = dense(X_BC, dense_RC, bias)
        scale = torch.linalg.vector_norm(expected, dtype=torch.float32) / expected.numel() ** 0.5
        error = (plan.matmul(packed, X_BC, bias) - expected).abs_()
        # Of values that reach 6 times the scale, two roundings to 8 bits are at most 0.05 apart.
        if not (error.max() < 0.1 * scale and error.mean(dtype=torch.float32) < 0.01 * scale):
            return False
    return True


def _calls(shape: MatmulShape) -> int:
    """Products for about a millisecond of work at 600 TFLOP/s."""
    return max(1, min(20, round(0.6e12 / (2 * shape.rows * shape.columns * shape.tokens))))


def graph_ms(*products: Callable[[], Any], calls: int = 10, rounds: int = 9) -> list[float]:
    """Median milliseconds of one call of each product, replayed from CUDA graphs in alternating rounds.

    From graphs, so that what the host costs, which a graph or a long queue hides, decides nothing.
    """
    graphs = [_capture(product, calls) for product in products]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, record in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            record.append(start.elapsed_time(end) / calls)
    return [statistics.median(record[rounds // 4 :]) for record in times]


def _capture(product: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), driver.capture_stream(torch.cuda.current_device())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        product()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(calls):
            product()
        graph.capture_end()
    torch.cuda.synchronize()
    return graph


# ---------------------------------------------------------------------------------------------------------------------
# The file of choices


def cache_file() -> Path:
    """Where choices are kept: plans.json in `driver.cache_folder()`."""
    return driver.cache_folder() / "plans.json"


def _key(shape: MatmulShape, device_index: int) -> str:
    """A product on a GPU model with these versions of the libraries; CuSparseLtError without the library."""
    library = "cuSPARSELt " + ".".join(map(str, cusparselt.handle(device_index).library.version))
    gpu = torch.cuda.get_device_name(device_index)
    sides = f"{shape.rows}x{shape.columns}x{shape.tokens}{' bias' if shape.bias else ''}"
    return " | ".join((gpu, library, f"torch {torch.__version__}", str(shape.dtype).removeprefix("torch."), sides))


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time in this process that the message comes up."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def saved_choices() -> dict[str, Choice]:
    """The lasting choices in the file, by key; none, with a warning, if it is damaged or of another format."""
    file = cache_file()
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ValueError("it is no regular file")
            text = stream.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
        content = json.loads(text)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        choices = {key: _parse(entry) for key, entry in content["plans"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warn_once(f"{file} is not a readable file of plans ({str(error)[:200]}): its shapes are measured again")
        return {}
    return {key: choice for key, choice in choices.items() if _lasting(choice)}


def _parse(entry: dict[str, Any]) -> Choice:
    """A choice as it stands in the file.

    Raises:
        TypeError, ValueError: a field is missing, unknown, or has a value that `_measure` never gives.
    """
    choice = Choice(**entry)
    times = [time for time in (choice.sparse_ms, choice.dense_ms) if time is not None]
    sound = isinstance(choice.sparse, bool) and isinstance(choice.reason, str) and choice.reason.isprintable()
    sound = sound and all(type(time) in (int, float) and 0 <= time < math.inf for time in times)
    if not sound or not all(type(value) is int for value in choice.algorithm.values()):
        raise ValueError("a plan has a value of the wrong kind")
    return choice


def measured_once(key: str, names: Iterable[str], measure: Callable[[], Choice]) -> dict[str, int]:
    """The algorithm, with attributes of these names, of a choice that is measured unless the file has it."""
    choice = saved_choices().get(key)
    if choice is None or choice.algorithm.keys() != set(names):
        choice = measure()
        save_choice(key, choice)
    return choice.algorithm


def save_choice(key: str, choice: Choice) -> None:
    """Add one choice to the file; safe among processes, and a reader never sees half a file."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            plans = {name: asdict(known) for name, known in {**saved_choices(), key: choice}.items()}
            descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
            with os.fdopen(descriptor, "w") as stream:
                json.dump({"format": _FORMAT, "plans": plans}, stream, indent=1, sort_keys=True)
            os.replace(name, file)
    except OSError as error:
        warn_once(f"choices of kernels cannot be kept in {file}: {error}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes, if the file system supports locks."""
    # No link is followed and no pipe waited for: the folder may be one that others write to.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

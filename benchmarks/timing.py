"""Shared by all measurements: timing in rounds, the allocator's peak, models with random weights."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from slope_cli.models import shapes
from sparse_kernels.driver import captured


@dataclass(frozen=True)
class Timing:
    """How often work runs, untimed and timed.

    warm_up: calls that compile, capture and choose algorithms. rounds: the median of these counts; each takes about
    `round_seconds` and at most `most_calls` calls. heat_seconds: of work before them on a GPU, because a cold one is a
    few per cent faster until its power limit lowers the clock.
    """

    warm_up: int
    rounds: int
    round_seconds: float = 0.0
    most_calls: int = 1
    heat_seconds: float = 0.0

    def medians(self, *work: Callable[[], object]) -> list[float]:
        """Median seconds of a call of each piece of work, in alternating rounds."""
        return [statistics.median(column) for column in zip(*self.alternating(*work), strict=True)]

    def alternating(self, *work: Callable[[], object]) -> list[list[float]]:
        """Seconds of a call of each piece of work in each of the rounds, which alternate."""
        end = time.monotonic() + (self.heat_seconds if torch.cuda.is_available() else 0.0)
        while time.monotonic() < end:
            for call in work:
                seconds(call)
        calls = [max(1, min(self.most_calls, round(self.round_seconds / seconds(call)))) for call in work]
        return [[seconds(call, n) for call, n in zip(work, calls, strict=True)] for _ in range(self.rounds)]


def seconds(work: Callable[[], object], calls: int = 1) -> float:
    """Mean seconds of a call, the GPU's work included."""
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    return (time.perf_counter() - started) / calls


def synchronize() -> None:
    """Wait for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Give unreachable memory back, the GPU's included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Peak:
    """The allocator's peak on a GPU; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._held = torch.cuda.memory_allocated() if self._on_gpu else 0
        self.restart()

    def restart(self) -> None:
        """Take the peak from here on."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def total(self) -> int | None:
        """Bytes."""
        return torch.cuda.max_memory_allocated() if self._on_gpu else None

    def above_start(self) -> int | None:
        """Bytes above those that were held when this was made."""
        return torch.cuda.max_memory_allocated() - self._held if self._on_gpu else None


def one_line(error: BaseException) -> str:
    """An error in a row of results."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def random_model(shape: PreTrainedConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a shape with random weights, drawn on the device: on a CPU the largest would take minutes."""
    model_class = getattr(transformers, shapes.FAMILIES[shape.model_type].model_class)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(shape)
    finally:
        torch.set_default_dtype(before)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.ones((2**31 if device.type == "cuda" else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    timing = Timing(warm_up=0, rounds=5, round_seconds=0.05, most_calls=50)
    (duration,) = timing.medians(lambda: target.copy_(source))
    return 2 * source.nbytes / duration


def graphed(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Work that a GPU repeats from a CUDA graph; on a CPU the work itself. It must allocate the same each time."""
    if device.type != "cuda":
        return work
    return captured(work).replay

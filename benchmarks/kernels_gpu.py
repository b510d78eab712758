"""The GPU kernels one by one: the two sparse products against dense, and the kernels around them.

    python -m slope_cli.benchmarks.kernels_gpu [--widths 768 2560] [--tokens 8192] [--out kernels-h100.json]

Products are replayed from CUDA graphs in alternating rounds. The kernels that only move memory run over several sets of
tensors, so that the cache does not hold them, and are compared with the speed of a copy in the same process.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from slope_cli.utils.environment import environment, gpu_libraries
from slope_cli.utils.files import write_json
from sparse_kernels import SparseLinear, cuda, kernel_choice, layers, masks
from sparse_kernels.matmul_plan import random_mask
from sparse_kernels.packed import packed_layer

from . import RESULTS
from .gemm import products, sides

WIDTHS = (768, 1024, 1280, 1600, 2048, 2560, 4096, 5120, 7168, 9216)
WORKING_SET = 256 << 20
"""Bytes: more than the L2 cache of any supported GPU."""


@dataclass(frozen=True)
class KernelRow:
    """A kernel over `layers` matrices of (rows, columns): microseconds, and those of a copy of as many bytes.

    host_us: the host's share of the call, where it was measured.
    """

    kernel: str
    rows: int
    columns: int
    layers: int
    us: float
    floor_us: float
    host_us: float | None = None


def copy_speed() -> float:
    """Bytes per second of a large copy, read and written counted."""
    source = torch.randint(255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (ms,) = kernel_choice.graph_ms(lambda: target.copy_(source), calls=5)
    return 2 * source.numel() / ms * 1e3


class Operands:
    """The tensors of one layer: float32 values, masks, and all that is written in bfloat16."""

    def __init__(self, rows: int, columns: int) -> None:
        half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        bits: dict[str, Any] = {"dtype": torch.uint8, "device": "cuda"}
        values, backward_bits = torch.randn(rows, columns // 2, device="cuda"), torch.empty(columns, rows // 8, **bits)
        self.weight = values, random_mask(rows, columns, torch.Generator("cuda")), backward_bits
        self.gradient = torch.randn(rows, columns, **half)
        self.w, self.w_t = torch.empty(rows, columns // 2, **half), torch.empty(columns, rows // 2, **half)
        self.metadata = torch.empty(rows * columns // 8, **bits)
        cuda.launch(cuda.refresh(*self.weight, update_mask=True))

    def update(self) -> None:
        """Choose the backward mask, and write the packed weights."""
        cuda.launch(cuda.refresh(*self.weight, update_mask=True, w=self.w, w_t=self.w_t, metadata=self.metadata))


# Bytes an entry of the dense matrix: dense 2, a mask and metadata 1/8 each, values 4/2, packed weights 2/2 each.
KERNELS: dict[str, tuple[Callable[[Operands], object], float]] = {
    "gather_kept": (lambda x: cuda.gather_kept(x.gradient, x.weight[1], torch.float32), 4.125),
    "refresh": (lambda x: cuda.launch(cuda.refresh(*x.weight, w=x.w, w_t=x.w_t)), 4.25),
    "update": (Operands.update, 4.375),
    "update, mask alone": (lambda x: cuda.launch(cuda.refresh(*x.weight, update_mask=True)), 2.25),
}


def memory_kernels(rows: int, columns: int, speed: float) -> Iterator[KernelRow]:
    """Each of KERNELS for a layer of this size, against a copy's bytes per second."""
    sets = [Operands(rows, columns) for _ in range(max(1, WORKING_SET // (4 * rows * columns)))]
    for name, (kernel, bytes_each) in KERNELS.items():
        (ms,) = kernel_choice.graph_ms(functools.partial(_each, kernel, sets), calls=1)
        floor_us = rows * columns * bytes_each / speed * 1e6
        yield KernelRow(name, rows, columns, 1, ms / len(sets) * 1e3, floor_us)


def _each(kernel: Callable[[Operands], object], sets: Sequence[Operands]) -> None:
    for operands in sets:
        kernel(operands)


def model_rewrites(speed: float) -> Iterator[KernelRow]:
    """One refresh and one mask update of all layers of a model of GPT-2's shape, every weight packed."""
    for width, blocks in ((768, 12), (1024, 24), (2560, 4)):
        sizes = [*sides(width).values()] * blocks
        model = torch.nn.ModuleList(_sparse(*size) for size in sizes)
        for layer, (_, inp) in zip(model, sizes, strict=True):
            layer(torch.randn(512, inp, dtype=torch.bfloat16, device="cuda", requires_grad=True)).sum().backward()
        for work, bytes_each in ((layers.refresh, 4.25), (layers.update_backward_masks, 4.375)):
            rewrite = functools.partial(work, model)
            rewrite()
            (ms,) = kernel_choice.graph_ms(rewrite, calls=1)
            floor_us = sum(out * inp for out, inp in sizes) * bytes_each / speed * 1e6
            host = host_us(rewrite, calls=20)
            yield KernelRow(work.__name__, width, width, len(sizes), ms * 1e3, floor_us, host)


def host_costs() -> dict[str, float]:
    """Host microseconds of one call of each piece, on a matrix so small that the GPU keeps up."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    layer, linear = _sparse(512, 512), torch.nn.Linear(512, 512, **half)
    X, dY = torch.randn(256, 512, **half, requires_grad=True), torch.ones(256, 512, **half)
    x, dense, dW = X.detach(), torch.randn(512, 512, **half), torch.randn(512, 512, **half)
    layer(X).sum().backward()
    weight = packed_layer(layer.row_mask_bits, torch.bfloat16, layer.backend).forward
    assert weight is not None
    with torch.no_grad():
        costs = {
            "PackedWeight.matmul": host_us(lambda: weight.matmul(x, None)),
            "SparseLinear.forward, no grad": host_us(lambda: layer(x)),
            "F.linear (dense)": host_us(lambda: F.linear(x, dense)),
            "gather_kept": host_us(lambda: cuda.gather_kept(dW, layer.row_mask_bits, torch.float32)),
            "refresh of one layer": host_us(lambda: layers.refresh(layer)),
        }
    costs["SparseLinear.forward, with grad"] = host_us(lambda: layer(X))
    costs["SparseLinear forward and backward"] = host_us(lambda: layer(X).backward(dY))
    costs["nn.Linear forward and backward"] = host_us(lambda: linear(X).backward(dY))
    return costs


def host_us(run: Callable[[], object], calls: int = 200) -> float:
    """Microseconds of host time of a call whose work the GPU finishes later: best of five."""
    for _ in range(20):
        run()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return best


def _sparse(out: int, inp: int) -> SparseLinear:
    """A layer whose products both run sparse, whichever would be faster."""
    weight = torch.randn(out, inp, device="cuda")
    layer = SparseLinear(weight, torch.randn(out, device="cuda"), masks.row_mask(weight, 2, 4), 2, 4)
    layer.backend = "cusparselt"
    return layer


def main() -> None:
    """Measure, print the rows as they come, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels-h100.json")
    options = parser.parse_args()
    speed = copy_speed()
    result: dict[str, Any] = {"machine": environment(), "libraries": gpu_libraries(), "copy_bytes_per_s": speed}
    result["host_us"] = host_costs()
    print(json.dumps(result))
    sizes = [(factor * width, width) for width in options.widths for factor in (1, 4)]
    parts: dict[str, Iterator[Any]] = {
        "memory": (row for rows, columns in sizes for row in memory_kernels(rows, columns, speed)),
        "model_rewrites": model_rewrites(speed),
        "products": (row for width in options.widths for row in products(width, options.tokens)),
    }
    for name, rows in parts.items():
        result[name] = []
        for row in rows:
            print(json.dumps(asdict(row)), flush=True)
            result[name].append(asdict(row))
    write_json(options.out, result)


if __name__ == "__main__":
    main()

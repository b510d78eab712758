"""Times the GPU kernels one by one: the two sparse products against dense, and the kernels around them.

    python -m benchmarks.kernels_gpu [--widths 768 2560] [--tokens 8192] [--out benchmarks/results/kernels-h100.json]

Products are replayed from CUDA graphs in alternating rounds; the kernels that only move memory run over several sets of
tensors, so that the cache does not hold them, and are compared with a copy's speed measured in the same run.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels import SparseLinear, autotune, cuda, cusparselt, layers, masks, packed
from sparse_kernels.matmul_plan import Shape, random_mask

WIDTHS = (768, 1024, 1280, 1600, 2048, 2560, 4096, 5120, 7168, 9216)
# Larger than the second-level cache of any card meant here.
_WORKING_SET = 256 << 20


def products(width: int, tokens: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The four matrices of a transformer block, forward (with bias) and input gradient."""
    sides = {"qkv": (3 * width, width), "proj": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    rows = []
    for name, (out, inp) in sides.items():
        for kind, shape in (
            ("forward", Shape(out, inp, tokens, dtype, True)),
            ("input_grad", Shape(inp, out, tokens, dtype, False)),
        ):
            start = time.perf_counter()
            choice, _ = autotune.choose(shape, 0)
            seconds = time.perf_counter() - start
            rows.append({"width": width, "matrix": name, "product": kind, "rows": shape.rows, "columns": shape.columns})
            rows[-1] |= {"tokens": tokens, "choose_s": seconds, "sparse": choice.sparse, "reason": choice.reason}
            rows[-1] |= {"sparse_ms": choice.sparse_ms, "dense_ms": choice.dense_ms, "algorithm": choice.algorithm}
    return rows


def copy_speed() -> float:
    """Bytes a second of a large copy, read and written counted."""
    source = torch.randint(255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (ms,) = autotune.graph_ms(lambda: target.copy_(source), calls=5)
    return 2 * source.numel() / ms * 1e3


def memory_kernels(rows: int, columns: int, speed: float) -> list[dict[str, Any]]:
    """gather_kept, refresh, renew, and renew of the masks alone, without copies, for a (rows, columns) layer.

    Values are float32, copies bfloat16.
    """
    size = rows * columns
    sets = [_layer(rows, columns) for _ in range(max(1, _WORKING_SET // (4 * size)))]
    gradients = [torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") for _ in sets]

    def gather() -> None:
        for (_, positions, *_), dense in zip(sets, gradients, strict=True):
            cuda.gather_kept(dense, positions, torch.float32)

    def refresh() -> None:
        for values, positions, positions_t, w, w_t, _ in sets:
            cuda.launch(cuda.refresh(values, positions, positions_t, w=w, w_t=w_t))

    def renew_masks() -> None:
        for values, positions, positions_t, *_ in sets:
            cuda.launch(cuda.refresh(values, positions, positions_t, renew=True))

    def renew() -> None:
        for values, positions, positions_t, w, w_t, metadata in sets:
            cuda.launch(cuda.refresh(values, positions, positions_t, renew=True, w=w, w_t=w_t, metadata=metadata))

    # Bytes an entry of the dense matrix: dense 2, positions and metadata 1/8 each, values 4/2, packed copies 2/2 each.
    kernels = {"gather_kept": (gather, 4.125), "refresh": (refresh, 4.25), "renew": (renew, 4.375)}
    kernels["renew, masks alone"] = (renew_masks, 2.25)
    found = []
    for name, (run, bytes_each) in kernels.items():
        (ms,) = autotune.graph_ms(run, calls=1)
        floor_ms = len(sets) * size * bytes_each / speed * 1e3
        found.append({"kernel": name, "rows": rows, "columns": columns, "us": ms / len(sets) * 1e3})
        found[-1] |= {"floor_us": floor_ms / len(sets) * 1e3, "share_of_copy_speed": floor_ms / ms}
    return found


def _layer(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, positions, positions_t, both copies, and the metadata of the second."""
    positions = random_mask(rows, columns, torch.Generator("cuda"))
    values = torch.randn(rows, columns // 2, device="cuda")
    positions_t = torch.empty(columns, rows // 8, dtype=torch.uint8, device="cuda")
    cuda.launch(cuda.refresh(values, positions, positions_t, renew=True))
    w = torch.empty(rows, columns // 2, dtype=torch.bfloat16, device="cuda")
    w_t = torch.empty(columns, rows // 2, dtype=torch.bfloat16, device="cuda")
    return values, positions, positions_t, w, w_t, torch.empty(rows * columns // 8, dtype=torch.uint8, device="cuda")


def host_us(run: Callable[[], Any], calls: int = 200) -> float:
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


def host_costs() -> dict[str, float]:
    """Host microseconds of one call of each piece, on a matrix so small that the GPU keeps up."""
    packed.set_backend("cusparselt")
    layer = _sparse(512, 512)
    X = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(X).sum().backward()
    state = packed.copies_of(layer.positions, torch.bfloat16)
    assert state.forward is not None
    plan = autotune.planned(Shape(512, 512, 256, torch.bfloat16, True), 0)
    assert plan is not None
    packed_weight, x, dense = (
        state.forward.packed,
        X.detach(),
        torch.randn(512, 512, dtype=torch.bfloat16, device="cuda"),
    )
    assert packed_weight is not None
    dW = torch.randn(512, 512, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        found = {
            "plan.matmul": host_us(lambda: plan.matmul(packed_weight, x, state.bias)),
            "SparseLinear.forward, no grad": host_us(lambda: layer(x)),
            "F.linear (dense)": host_us(lambda: F.linear(x, dense)),
            "gather_kept": host_us(lambda: cuda.gather_kept(dW, layer.positions, torch.float32)),
            "refresh of one layer": host_us(lambda: layers.refresh(layer)),
        }
    found["SparseLinear.forward, with grad"] = host_us(lambda: layer(X))
    dY = torch.ones(256, 512, dtype=torch.bfloat16, device="cuda")
    found["SparseLinear forward and backward"] = host_us(lambda: layer(X).backward(dY))
    linear = torch.nn.Linear(512, 512, device="cuda", dtype=torch.bfloat16)
    found["nn.Linear forward and backward"] = host_us(lambda: linear(X).backward(dY))
    packed.set_backend("auto")
    return found


def model_rewrites(speed: float) -> list[dict[str, Any]]:
    """One `refresh`, and one renewal of the masks, of all layers of a model of GPT-2's shape, every copy packed."""
    packed.set_backend("cusparselt")
    found = []
    for width, blocks in ((768, 12), (1024, 24), (2560, 4)):
        sides = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * blocks
        model = torch.nn.ModuleList(_sparse(*side) for side in sides)
        for layer, (_, inp) in zip(model, sides, strict=True):
            layer(torch.randn(512, inp, dtype=torch.bfloat16, device="cuda", requires_grad=True)).sum().backward()
        for work, bytes_each in ((layers.refresh, 4.25), (layers.renew_column_masks, 4.375)):
            rewrite = functools.partial(work, model)
            rewrite()
            (ms,) = autotune.graph_ms(rewrite, calls=1)
            floor_us = sum(out * inp for out, inp in sides) * bytes_each / speed * 1e6
            found.append({"kernel": work.__name__, "width": width, "layers": len(sides), "us": ms * 1e3})
            found[-1] |= {"floor_us": floor_us, "host_us": host_us(rewrite, calls=20)}
    packed.set_backend("auto")
    return found


def _sparse(out: int, inp: int) -> SparseLinear:
    weight = torch.randn(out, inp, device="cuda")
    return SparseLinear(weight, torch.randn(out, device="cuda"), masks.row_mask(weight, 2, 4), 2, 4)


def versions() -> dict[str, Any]:
    import cupy

    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found["cusparselt"] = ".".join(map(str, cusparselt.library().version))
    return {**found, "cupy": cupy.__version__}


def print_products(rows: list[dict[str, Any]]) -> None:
    print(f"{'shape':>16} {'product':>11} {'dense ms':>9} {'sparse ms':>9} {'ratio':>6} {'alg':>4} {'choose s':>8}")
    for row in rows:
        shape = f"{row['rows']}x{row['columns']}"
        if row["sparse_ms"] is None:
            print(f"{shape:>16} {row['product']:>11} {row['reason']}")
            continue
        ratio, number = row["dense_ms"] / row["sparse_ms"], row["algorithm"]["config_id"]
        times = f"{row['dense_ms']:9.3f} {row['sparse_ms']:9.3f} {ratio:6.2f}"
        print(f"{shape:>16} {row['product']:>11} {times} {number:4d} {row['choose_s']:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels-h100.json"))
    arguments = parser.parse_args()
    speed = copy_speed()
    result: dict[str, Any] = {"versions": versions(), "copy_bytes_per_s": speed, "host_us": host_costs()}
    print(result["versions"], f"copy {speed / 1e12:.2f} TB/s")
    for name, us in result["host_us"].items():
        print(f"{us:7.1f} us host  {name}")
    result["memory"] = []
    for width in arguments.widths:
        result["memory"] += memory_kernels(width, width, speed) + memory_kernels(4 * width, width, speed)
    for row in result["memory"]:
        shape = f"{row['rows']}x{row['columns']}"
        print(f"{shape:>16} {row['kernel']:>18} {row['us']:8.1f} us {row['share_of_copy_speed']:5.2f} of copy speed")
    result["model_rewrites"] = model_rewrites(speed)
    for row in result["model_rewrites"]:
        times = f"{row['us']:.0f} us (floor {row['floor_us']:.0f}), host {row['host_us']:.0f} us"
        print(f"{row['kernel']} of {row['layers']} layers of width {row['width']}: {times}")
    result["products"] = []
    for width in arguments.widths:
        result["products"] += products(width, arguments.tokens, torch.bfloat16)
    print_products(result["products"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Products of a packed 2:4 matrix with at most 64 tokens, by few_tokens.cu, compiled for one shape of work at a time.

The shapes of work are measured once for each matrix shape, its adapters and a power of two of tokens, on a GPU model,
and kept on disk beside the library's plans (kernel_choice). Adapters are added in the kernel or by cuBLAS after it,
whichever was faster.

Shape suffixes: B tokens, R rows and C columns of the matrix, K = C/2 kept entries of a row, L ranks of an adapter, S
segments.
"""

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels import cuda, driver, kernel_choice, tile_metadata
from sparse_kernels.kernel_choice import Choice
from sparse_kernels.matmul_plan import random_mask
from sparse_kernels.packed import outside_graphs

SOURCE = Path(__file__).with_name("few_tokens.cu")
KERNEL = "few_tokens"
MOST_TOKENS = 64
RANKS = 16
"""Adapters' ranks are padded to multiples of this, and layers that are fused have such numbers of rows."""
MOST_SEGMENTS = 3
_CHUNK = 128  # columns that a warp takes at once
_LORA_BYTES = 144  # of a staged row of adapters' operands
_ROW_BYTES = 144 + 16  # of a row of a staged chunk, with its metadata
# (mt, wm, wk, depth) of work that was among the fastest for some shape on an H200, by eights of tokens.
_REGISTERS = {
    1: ((1, 1, 16, 1), (1, 1, 8, 1), (1, 1, 8, 2), (1, 2, 8, 1), (2, 2, 4, 2)),
    2: ((2, 2, 4, 2),),
    4: (),
    8: (),
}
_STAGED = {
    1: ((1, 4, 2, 3), (1, 4, 2, 5), (1, 4, 4, 3), (1, 8, 2, 4)),
    2: ((1, 4, 2, 3), (1, 4, 2, 5), (1, 4, 4, 3), (2, 4, 2, 2), (2, 4, 2, 3), (2, 8, 1, 3)),
    4: ((1, 4, 2, 5), (1, 4, 4, 2), (2, 4, 2, 2), (2, 4, 2, 4), (2, 8, 1, 3), (2, 8, 1, 4)),
    8: ((1, 4, 2, 3), (1, 8, 1, 3), (2, 4, 2, 2), (2, 8, 1, 3)),
}
_WARPGROUPS = ((4, 2), (8, 1), (8, 2), (16, 1))  # (wm, wk); the stages are as many as one block, or two, have room for
MOST_TOKENS_WITH_X = 8
"""Up to which X is multiplied with adapters' A in the launch that makes X, where that can (`cuda.norm`)."""
_SPLITS = (1, 2, 3, 4, 6, 8)
_L2_BYTES = 120e6  # copies of a matrix that are timed in turn, so that no cache serves them


class Work(NamedTuple):
    """A shape of work, as few_tokens.cu names it.

    kind: 0 where weights go to registers, 1 through shared memory, 2 the same for warpgroups. nt: eights of tokens. mt:
    bands of 16 rows that a warp holds. wm, wk: warps along the rows and along the columns. depth: chunks that a warp
    has on their way, or stages. slice: chunks of X in shared memory at once. splits: blocks, a cluster, that share a
    row's columns. beside: 1 where cuBLAS adds the adapters' products after the kernel.
    """

    kind: int
    nt: int
    mt: int
    wm: int
    wk: int
    depth: int
    slice: int
    splits: int = 1
    beside: int = 0

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.wm * self.wk

    @property
    def rows(self) -> int:
        """Of a block."""
        return 16 * self.mt * self.wm

    @property
    def first_side(self) -> int:
        """Tokens, and ranks, of a block that computes adapters' first product."""
        return 8 if self.nt == 1 else 16

    @property
    def stage_bytes(self) -> int:
        """Of warpgroups: the values, metadata and X of `slice` chunks."""
        return self.slice * (self.rows * 144 + self.nt * 8 * 256)

    def shared_bytes(self, columns: int, *, adapted: bool = True) -> tuple[int, int]:
        """How many slices, or stages, are in shared memory, and the bytes of it that a block takes."""
        x = 8 * self.nt * (self.slice * 256 + 16)
        one_slice = math.ceil(math.ceil(columns / _CHUNK) / self.splits) <= self.slice
        stages = self.depth if self.kind else 1 if one_slice else 2
        if self.kind == 1:
            x += self.slice * self.rows * _ROW_BYTES
        size = self.depth * (self.stage_bytes + 8) + 1024 if self.kind == 2 else stages * x
        lora = adapted * (self.rows + MOST_SEGMENTS * 8 * self.nt) * _LORA_BYTES
        size = max(size, lora) if self.kind else size + lora
        first = adapted * self.threads // 32 * self.first_side**2 * 4
        return stages, max(size, first, self.wk * 8 * self.nt * self.rows * 4)


class Adapters(NamedTuple):
    """Adapters that a product adds: A (S·L, C), B (R, L), and the rows of each of S segments.

    L is a multiple of RANKS; segments' rows are multiples of 16. Z (B, S·L): X · A^T, where it is there already.
    """

    A: Tensor
    B: Tensor
    rows: tuple[int, ...]
    Z: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """L, and the rows of each segment: what a choice of work depends on."""
        return self.B.shape[1], *self.rows

    def add_to(self, Y_BR: Tensor, X_BC: Tensor, beta: int = 1) -> None:
        """Y becomes beta · Y + the sum of their products, in place, by cuBLAS; beta 0 does not read Y."""
        Z_BL = F.linear(X_BC, self.A) if self.Z is None else self.Z  # [B,C] · [S·L,C]^T -> [B,S·L]
        parts = Y_BR.split([*self.rows], 1), Z_BL.split(self.B.shape[1], 1), self.B.split([*self.rows])
        for Y_Br, Z_Bl, B_rl in zip(*parts, strict=True):
            torch.addmm(Y_Br, Z_Bl, B_rl.t(), beta=beta, out=Y_Br)  # [B,l] · [r,l]^T -> [B,r]


def refusal(rows: int, columns: int, dtype: torch.dtype, device_index: int) -> str:
    """Why the kernel cannot take a matrix (R, C); empty if it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    if rows % 16 or columns % 16:
        return "sides are not multiples of 16"
    return cuda.missing(device_index)


def matmul(
    work: Work,
    values_RK: Tensor,
    metadata: Tensor,
    X_BC: Tensor,
    bias_R: Tensor | None = None,
    residual_BR: Tensor | None = None,
    adapters: Adapters | None = None,
) -> Tensor:
    """Y = X · A^T + bias + residual, and adapters' products, on torch's current stream.

    Values, metadata and adapters are read before the kernel in front has ended: that must not be one that writes them.

    Args:
        work: from `work_for`.
        values_RK: (R, C/2), bfloat16 or float16 as all others, contiguous.
        metadata: uint8, in tile order.
        X_BC: (B, C), contiguous, 16-byte aligned.
        bias_R: (R,) or None. residual_BR: (B, R) or None.

    Returns:
        (B, R); sums are float32, rounded once, or twice where adapters are added beside the kernel.
    """
    (tokens, columns), rows, device = X_BC.shape, values_RK.shape[0], X_BC.device
    if adapters is not None and work.beside:
        Y_BR = matmul(work, values_RK, metadata, X_BC, bias_R, residual_BR)
        adapters.add_to(Y_BR, X_BC)
        return Y_BR
    Y_BR = X_BC.new_empty(tokens, rows)
    stages, shared = work.shared_bytes(columns, adapted=adapters is not None)
    A = B = Z = ready = None
    parts: tuple[int, ...] = (rows,)
    first_blocks = rank = 0
    if adapters is not None:
        (A, B, parts, Z), rank = adapters, adapters.B.shape[1]
        if Z is None:
            Z, ready = X_BC.new_empty(tokens, len(A)), _counters(device.index)
            first_blocks = len(A) // work.first_side * -(-tokens // work.first_side)
    ends = [*itertools.accumulate(parts[:-1]), rows, rows][:2]
    operands = map(driver.address, (values_RK, metadata, X_BC, bias_R, residual_BR, Y_BR))
    lora = (*map(driver.address, (A, B, Z)), rank, len(parts), *ends, first_blocks, driver.address(ready))
    arguments: tuple[Any, ...] = (*operands, rows, columns, tokens, stages, *lora)
    if work.kind == 2:
        arguments += (
            driver.tensor_map(values_RK.data_ptr(), rows, columns // 2, work.rows),
            driver.tensor_map(X_BC.data_ptr(), tokens, columns, 8 * work.nt),
        )
    grid = (first_blocks - rows // -work.rows, work.splits)
    function = _compiled(_bare(work), adapters is not None, X_BC.dtype, device.index)
    driver.launch_early(function, grid, work.threads, device, arguments, shared, work.splits)
    return Y_BR


_COUNTERS = 4096  # of launches that may be on their way at once, in all graphs


@functools.cache
def _all_counters(device_index: int) -> Iterator[Tensor]:
    device = torch.device("cuda", device_index)
    zeros = outside_graphs(lambda: torch.zeros(_COUNTERS, 2, dtype=torch.int32, device=device))
    return itertools.cycle(zeros.unbind())


def _counters(device_index: int) -> Tensor:
    """Two zeros, (2,) int32, by which blocks of a launch wait for each other, and which it leaves as zeros.

    Launches on several streams must not have the same ones at once: _COUNTERS is more than are on their way. Those of
    one stream may, as graphs of a large model do: a launch reads and writes them after the one in front has ended.
    """
    return next(_all_counters(device_index))


def _bare(work: Work) -> Work:
    """Without what its kernel does not depend on."""
    return work._replace(splits=1, beside=0)


def compile_all(works: Iterable[Work], adapted: bool, dtype: torch.dtype, device_index: int) -> None:
    """Compile the kernels of many shapes of work at once, for `matmul` to find."""
    kernels = {_bare(work) for work in works}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the compiler runs outside of Python's lock
        list(threads.map(lambda work: _compiled(work, adapted, dtype, device_index), kernels))


@functools.cache
def _compiled(work: Work, adapted: bool, dtype: torch.dtype, device_index: int) -> Any:
    names = ("KIND", "NT", "MT", "WM", "WK", "DEPTH", "SLICE")
    definitions = {"HALF": int(dtype == torch.float16), "ADAPTERS": int(adapted)}
    definitions |= zip(names, work, strict=False)  # not the others
    room, architecture = driver.most_shared_bytes(device_index), "sm_90a" if work.kind == 2 else ""
    made = driver.compiled(SOURCE, {KERNEL: room}, definitions, device_index, architecture=architecture)
    return made[KERNEL]


# ---------------------------------------------------------------------------------------------------------------------
# Choosing

_Shape = tuple[int, int, int, torch.dtype, tuple[int, ...]]
"""R, C, tokens, dtype, and `Adapters.shape`; () without adapters."""
_CHOSEN: dict[tuple[_Shape, int], Work] = {}


def work_for(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, device_index: int, lora: tuple[int, ...] = ()
) -> Work:
    """The fastest work for a matrix (R, C) that the kernel takes, and so many tokens, decided once.

    lora: `Adapters.shape`; () without adapters.

    The first process on a GPU model compiles and measures some twenty of them for each shape; later ones read the file.

    Raises:
        RuntimeError: a new shape is met while a CUDA graph is being captured.
    """
    bucket = min(b for b in (1, 2, 4, 8, 16, 32, 64) if b >= tokens)
    key = (rows, columns, bucket, dtype, lora), device_index
    if key not in _CHOSEN:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"run one step before capturing a CUDA graph: {key[0]} has not been measured yet")
        _CHOSEN[key] = _choose(*key)
    return _CHOSEN[key]


def candidates(rows: int, columns: int, tokens: int, device_index: int, *, warpgroups: bool) -> Iterator[Work]:
    """The shapes of work that are worth measuring: of warpgroups, or those that every GPU can do."""
    nt, chunks = -(-tokens // 8), -(-columns // _CHUNK)
    room = driver.most_shared_bytes(device_index)
    multiprocessors = torch.cuda.get_device_properties(device_index).multi_processor_count
    if nt > 1 and warpgroups:
        sides = _of_warpgroups(nt, [room, room // 2])
    else:
        ring = [(0, *most, slice) for most in _REGISTERS[nt] for slice in ((32, 128) if tokens == 1 else (16, 32))]
        sides = [*ring, *((1, *most, most[2]) for most in _STAGED[nt])]
    for kind, mt, wm, wk, depth, size in sides:
        for splits in _SPLITS if driver.overlaps(device_index) else (1,):
            work = Work(kind, nt, mt, wm, wk, depth, max(size, wk), splits)
            share, blocks = -(-chunks // splits), -(-rows // work.rows) * splits
            idle = (splits - 1) * share >= chunks or share < wk or (size > 32 and size >= 2 * share)
            crowded = splits > 1 and blocks > 3 * multiprocessors
            if not idle and not crowded and work.shared_bytes(columns)[1] <= room:
                yield work
    yield Work(1, nt, 1, 4, 1, 3, 1)  # for matrices or GPUs that are too small for any of them


def _of_warpgroups(nt: int, rooms: list[int]) -> list[tuple[int, int, int, int, int, int]]:
    """With as many stages as each of these numbers of bytes has room for."""
    sides = []
    for (wm, wk), room, chunks in itertools.product(_WARPGROUPS, rooms, (1, 2)):
        stage = Work(2, nt, 1, wm, wk, 1, chunks * wk).stage_bytes
        depth = min((room - 2048) // stage, 12 // chunks)  # a block takes 1 KB more
        if depth > 1:
            sides.append((2, 1, wm, wk, depth, chunks * wk))
    return [*dict.fromkeys(sides)]


def _choose(shape: _Shape, device_index: int) -> Work:
    def measure() -> Choice:
        with torch.cuda.device(device_index), torch.no_grad():
            work, milliseconds = outside_graphs(lambda: _measure(shape, device_index))
        return Choice(True, "the fastest kernel for few tokens", milliseconds, algorithm=work._asdict())

    return Work(**kernel_choice.measured_once(_key(shape, device_index), Work._fields, measure))


def _key(shape: _Shape, device_index: int) -> str:
    rows, columns, tokens, dtype, lora = shape
    source = hashlib.sha256(driver.source_text(SOURCE).encode()).hexdigest()[:8]
    sides = f"{rows}x{columns}x{tokens}" + (f" adapters {'x'.join(map(str, lora))}" if lora else "")
    gpu = torch.cuda.get_device_name(device_index)
    return " | ".join((gpu, f"few_tokens {source}", str(dtype).removeprefix("torch."), sides))


def _measure(shape: _Shape, device_index: int) -> tuple[Work, float]:
    """The fastest work that agrees with a dense product, and its milliseconds."""
    rows, columns, tokens, dtype, lora = shape
    warpgroups = torch.cuda.get_device_capability(device_index) == (9, 0)
    works = list(candidates(rows, columns, tokens, device_index, warpgroups=warpgroups))
    compile_all(works, bool(lora), dtype, device_index)
    if lora:
        works.append(work_for(rows, columns, tokens, dtype, device_index)._replace(beside=1))
    operands, X_BC, expected = _operands(shape, device_index)
    copies = [operands, *map(_copy, [operands] * max(1, math.ceil(_L2_BYTES / (rows * columns * 1.125)) - 1))]
    torch.cuda.synchronize()  # products read weights before the kernel in front of them has ended
    timed = []
    for work in works:
        error = (operands.matmul(work, X_BC).float() - expected).abs().max()
        if error < 0.1 * expected.std():
            timed.append((_milliseconds(functools.partial(_in_turn, work, copies, X_BC)) / len(copies), work))
    if not timed:
        raise RuntimeError(
            f"no kernel computes a product of {rows} x {columns} with {tokens} tokens rightly on this GPU"
        )
    milliseconds, work = min(timed)
    return work, milliseconds


class _Operands(NamedTuple):
    """What a work is measured with, beside X."""

    values_RK: Tensor
    metadata: Tensor
    adapters: Adapters | None

    def matmul(self, work: Work, X_BC: Tensor) -> Tensor:
        return matmul(work, self.values_RK, self.metadata, X_BC, adapters=self.adapters)


def _operands(shape: _Shape, device_index: int) -> tuple[_Operands, Tensor, Tensor]:
    """Random ones, X (B, C), and what dense products make of them, (B, R) in float32."""
    rows, columns, tokens, dtype, lora = shape
    device = torch.device("cuda", device_index)
    generator = torch.Generator(device).manual_seed(0)  # not the global one, whose state belongs to the run

    def normal(*sides: int) -> Tensor:
        return torch.randn(sides, dtype=dtype, device=device, generator=generator)

    bits = random_mask(rows, columns, generator)
    metadata = torch.empty(tile_metadata.metadata_bytes(rows, columns), dtype=torch.uint8, device=device)
    # Whole tiles, as `cuda.metadata` takes them.
    padded = F.pad(bits, (0, -bits.shape[1] % 4, 0, -rows % 64), value=0x33)
    cuda.launch(cuda.metadata(padded, metadata))
    values_RK, X_BC = normal(rows, columns // 2), normal(tokens, columns)
    dense_RC = torch.empty(rows, columns, dtype=dtype, device=device)
    cuda.launch(cuda.refresh(values_RK, bits, bits.view(columns // 8, rows), w=dense_RC))
    expected_BR = F.linear(X_BC, dense_RC)  # [B,C] · [R,C]^T -> [B,R]
    if not lora:
        return _Operands(values_RK, metadata, None), X_BC, expected_BR.float()
    ranks, *parts = lora  # the adapters' sum is as large as the matrix's
    A_LC, B_RL = normal(len(parts) * ranks, columns) / columns**0.5, normal(rows, ranks) * (columns / 2 / ranks) ** 0.5
    adapters = Adapters(A_LC, B_RL, tuple(parts))
    adapters.add_to(expected_BR, X_BC)
    return _Operands(values_RK, metadata, adapters), X_BC, expected_BR.float()


def _copy(operands: _Operands) -> _Operands:
    values_RK, metadata, adapters = operands
    if adapters is not None:
        adapters = adapters._replace(A=adapters.A.clone(), B=adapters.B.clone())
    return _Operands(values_RK.clone(), metadata.clone(), adapters)


def _in_turn(work: Work, copies: list[_Operands], X_BC: Tensor) -> None:
    for operands in copies:
        operands.matmul(work, X_BC)


def _milliseconds(products: Callable[[], None]) -> float:
    return kernel_choice.graph_ms(products, calls=1, rounds=5)[0]


def forget() -> None:
    """Forget the choices of this process; the file stays."""
    _CHOSEN.clear()

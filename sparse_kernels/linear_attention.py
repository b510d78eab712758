"""Linearized attention of one new token for each row, over a window of keys and a state of those before, in one launch.

Shape suffixes: B rows, H query heads, G KV heads, P query heads for each KV head (H = G·P), S = H + 2 G, W remembered
keys of the window, D head dimension, M columns of a feature map, F features, E = D + 1.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_kernels import cuda, driver

SOURCE = Path(__file__).with_name("decode_linear.cu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_DIM, _MOST_FEATURES, _MOST_SHARED_HEADS = 128, 256, 8
_FEWEST_COLUMNS = 8  # of a feature map that are worth a block
_MOST_SPLITS = 8  # blocks of a cluster
_STATIC_BYTES = 40 << 10  # of shared memory, beside the dynamic ones, at most


class Heads(NamedTuple):
    """What the heads of a layer have learned: float32, contiguous, on the device.

    map_q, map_k: the columns W of the feature maps, (H, D, M) and (G, D, M).
    bias_q, bias_k: (H, M) and (G, M): features are relu(x·W + b), F = M; None: [softmax(x·W), softmax(-x·W)], F = 2 M.
    mix: (H,), the factor of the window's weights.
    gate, gate_bias: (G, D) and (G,), of a gated state; None for none.
    """

    map_q: Tensor
    map_k: Tensor
    bias_q: Tensor | None
    bias_k: Tensor | None
    mix: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None

    @property
    def features(self) -> int:
        """F."""
        return self.map_q.shape[2] * (1 if self.bias_q is not None else 2)


class Memory(NamedTuple):
    """What each row remembers, changed in place; contiguous.

    keys, values: (B, G, W, D), a ring. keep: (B, W), bool, which of them are real. state: (B, G, F, E), float32, the
    sum of phi(k)^T·[v, 1] over the keys before. oldest: (1,), int64, where the ring's oldest key is.
    """

    keys: Tensor
    values: Tensor
    keep: Tensor
    state: Tensor
    oldest: Tensor


class Plan(NamedTuple):
    """What a launch is compiled for, and its sides; shared_bytes: of dynamic shared memory."""

    definitions: dict[str, int]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


def attend_new_tokens(
    qkv_BSD: Tensor, rotary: Tensor | None, memory: Memory, heads: Heads, scale: float, arrived: Tensor
) -> Tensor:
    """Turn the new tokens' queries and keys, attend, and let the memory go on by a token: (B, H, D).

    With s_j = scale·q·k_j over the window's real keys and the new one, and c their maximum:

        y = (mix·sum exp(s_j - c)·[v_j, 1] + phi_q(scale·sqrt(D)·q)·state), numerators over the denominator
        state = exp(-relu(gate·k + gate_bias))·state + phi_k(k)^T·[v, 1]    with the oldest key, if it is real

    and the new token takes the oldest one's place. One launch, fit for a CUDA graph. `memory` and `heads` are read
    before the kernel in front has ended: that must not be one that writes them.

    Args:
        qkv_BSD: the queries of a row's H heads, then the keys and values of its G heads; see `takes`.
        rotary: (2, B, D) of its dtype, as `attention.turn` takes it, for each row's place; None for none.
        memory: keys and values of its dtype.
        arrived: int32 (1,), zero before and after, which no other stream uses.

    Raises:
        ValueError: sides, dtypes or strides that do not fit, or no GPU that has the kernel.
    """
    _check(qkv_BSD, rotary, memory, heads, arrived)
    if not takes(qkv_BSD, memory, heads):
        raise ValueError(f"no kernel for heads of {tuple(heads.map_q.shape)} on {qkv_BSD.device}, {qkv_BSD.dtype}")
    (B, G, W, D), H, device = memory.keys.shape, len(heads.map_q), qkv_BSD.device
    how = plan(qkv_BSD, memory, heads, _splits(B, G, heads.map_q.shape[2], device))
    rotary, out_BHD = None if rotary is None else rotary.contiguous(), qkv_BSD.new_empty(B, H, D)
    operands = map(driver.address, (qkv_BSD.contiguous(), rotary, *memory, *heads, out_BHD, arrived))
    function = _function(tuple(how.definitions.items()), how.shared_bytes, device.index)
    sides = (how.grid, how.threads, device)
    driver.launch_early(function, *sides, (*operands, B, G, W, float(scale)), how.shared_bytes, how.grid[1])
    return out_BHD


def takes(qkv_BSD: Tensor, memory: Memory, heads: Heads) -> bool:
    """Whether there is a kernel for the device, the dtype and the sides of these."""
    (G, W, D), (H, _, M) = memory.keys.shape[1:], heads.map_q.shape
    if not qkv_BSD.is_cuda or qkv_BSD.dtype not in _DTYPES or cuda.missing(qkv_BSD.get_device()):
        return False
    if D % 8 or D > _MOST_DIM or not 0 < heads.features <= _MOST_FEATURES or H // G > _MOST_SHARED_HEADS or not W:
        return False
    how = plan(qkv_BSD, memory, heads, _splits(len(qkv_BSD), G, M, qkv_BSD.device))
    return how.shared_bytes + _STATIC_BYTES <= driver.most_shared_bytes(qkv_BSD.get_device())


def plan(qkv_BSD: Tensor, memory: Memory, heads: Heads, splits: int) -> Plan:
    """The launch over these rows, with so many blocks for each KV head of a row."""
    (B, G, W, D), (H, _, M) = memory.keys.shape, heads.map_q.shape
    shared, relu, gated = H // G, heads.bias_q is not None, heads.gate is not None
    definitions = {"D": D, "P": shared, "M": M, "MAP": int(relu), "GATED": int(gated), "SPLITS": splits}
    if qkv_BSD.dtype != torch.float32:
        definitions["HALF"] = int(qkv_BSD.dtype == torch.float16)
    threads = -(-(256 // D * (D + 1)) // 32) * 32
    keys, totals = (W + splits) // splits, -(-(splits * shared * (D + 1)) // 4) * 4
    return Plan(definitions, (B, splits, G), threads, 4 * (totals + keys * shared))


def _splits(rows: int, kv_heads: int, columns: int, device: torch.device) -> int:
    """How many blocks, a power of two, share a KV head of a row: as many as there are multiprocessors for."""
    if not driver.overlaps(device.index):
        return 1
    free = torch.cuda.get_device_properties(device).multi_processor_count // (rows * kv_heads)
    most = min(free, columns // _FEWEST_COLUMNS, _MOST_SPLITS)
    return 1 << max(0, most.bit_length() - 1)


@functools.cache
def _function(definitions: tuple[tuple[str, int], ...], shared_bytes: int, device_index: int) -> Any:
    return driver.compiled(SOURCE, {"decode_linear": shared_bytes}, dict(definitions), device_index)["decode_linear"]


def _check(qkv_BSD: Tensor, rotary: Tensor | None, memory: Memory, heads: Heads, arrived: Tensor) -> None:
    (H, D, M), G, B, dtype = heads.map_q.shape, len(heads.map_k), len(qkv_BSD), qkv_BSD.dtype
    W = memory.keys.shape[2]
    if H % G:
        raise ValueError(f"{H} query heads cannot share {G} KV heads evenly")
    if (heads.bias_q is None) != (heads.bias_k is None) or (heads.gate is None) != (heads.gate_bias is None):
        raise ValueError("bias_q and bias_k, and gate and gate_bias, are given together or not at all")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "qkv_BSD": (qkv_BSD, (B, H + 2 * G, D), dtype),
        "rotary": (rotary, (2, B, D), dtype),
        "keys": (memory.keys, (B, G, W, D), dtype),
        "values": (memory.values, (B, G, W, D), dtype),
        "keep": (memory.keep, (B, W), torch.bool),
        "state": (memory.state, (B, G, heads.features, D + 1), torch.float32),
        "oldest": (memory.oldest, (1,), torch.int64),
        "map_q": (heads.map_q, (H, D, M), torch.float32),
        "map_k": (heads.map_k, (G, D, M), torch.float32),
        "bias_q": (heads.bias_q, (H, M), torch.float32),
        "bias_k": (heads.bias_k, (G, M), torch.float32),
        "mix": (heads.mix, (H,), torch.float32),
        "gate": (heads.gate, (G, D), torch.float32),
        "gate_bias": (heads.gate_bias, (G,), torch.float32),
        "arrived": (arrived, (1,), torch.int32),
    }
    for name, (tensor, shape, of_dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != of_dtype or tensor.device != qkv_BSD.device:
            found = f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
            raise ValueError(f"{name} must be {shape}, {of_dtype}, on {qkv_BSD.device}, got {found}")
        if name not in ("qkv_BSD", "rotary") and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if name in ("keys", "map_q", "map_k", "bias_q", "bias_k") and tensor.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes")

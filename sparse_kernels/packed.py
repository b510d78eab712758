"""The 16-bit copies of a 2:4 layer's weight that its products on a GPU read, and the backend that decides their form.

The copies are derived from `values` and the positions, kept beside the layer, never saved. Each is packed for
cuSPARSELt where `plans.choose` finds that faster, else dense for cuBLAS. They are rewritten in place when they are
stale: when a tensor they come from was written (its version), or any optimizer has stepped (torch's fused optimizers
change no version). What runs inside a captured CUDA graph is not seen: there, call `refresh(model)` after the step.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_kernels import autotune, cuda, cusparselt
from sparse_kernels.matmul_plan import Plan, Shape, compress, packed_metadata, packed_values, writes_metadata

Backend = Literal["auto", "cusparselt", "dense", "reference"]
_backend: Backend = "auto"


def set_backend(backend: Backend) -> None:
    """Say how 2:4 layers are computed on a GPU from now on, in the whole process.

    Args:
        backend: "auto" takes for each product what was measured to be faster; "cusparselt" and "dense" take that one
            wherever it can be had; "reference" is plain torch, as on a CPU.

    Raises:
        ValueError: another word.
        CuSparseLtError: "cusparselt" and the library is missing or too old.
    """
    global _backend
    if backend not in ("auto", "cusparselt", "dense", "reference"):
        raise ValueError(f"backend must be 'auto', 'cusparselt', 'dense' or 'reference', got {backend!r}")
    if backend == "cusparselt":
        cusparselt.library()
    _backend = backend
    _COPIES.clear()


def backend() -> Backend:
    """What `set_backend` said last; "auto" at first."""
    return _backend


T = TypeVar("T")


def _apart(make: Callable[[], T]) -> T:
    """Run what measures, or allocates for good, in a thread of its own.

    Inductor's CUDA graphs claim whatever the calling thread allocates in their first run, and let nothing outlive it.

    Raises:
        RuntimeError: a CUDA graph is being captured, which can hold neither.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "run one step before capturing a CUDA graph, or prepare(model, tokens): a sparse layer is new to this input"
        )

    device = torch.cuda.current_device()

    def run() -> T:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.synchronize()
        return made

    torch.cuda.current_stream().synchronize()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


class Operand:
    """One copy: W^R (rows = out features), or W^{R,C} transposed (rows = in features)."""

    def __init__(self, bits: Tensor, columns: int, dtype: torch.dtype, choice: autotune.Choice) -> None:
        self.rows, self.columns, self.dtype, self.choice = bits.shape[0], columns, dtype, choice
        self.packed: Tensor | None = None
        self._plans: dict[tuple[int, bool], Plan | None] = {}
        self.metadata: Tensor | None = None  # where the kernels may write it
        self.settle(bits)
        if choice.sparse:
            self.packed = compress(cuda.mark(bits, dtype))
            if writes_metadata(self.rows, columns, dtype, bits.get_device()):
                self.metadata = packed_metadata(self.packed, self.rows, columns)
            self.target = packed_values(self.packed, self.rows, columns, dtype)
        else:
            self.target = torch.empty(self.rows, columns, dtype=dtype, device=bits.device)

    def settle(self, bits: Tensor) -> None:
        """The metadata is of the mask as it is now: by what is being launched, or by a CUDA graph that was replayed."""
        self._marked = bits.data_ptr(), _version(bits)

    def follow(self, bits: Tensor) -> list[cuda.Work]:
        """Make the metadata anew if the mask has changed, in place: by what the caller must launch, or at once.

        The values are to be rewritten then.
        """
        if self.packed is None or self._marked == (bits.data_ptr(), _version(bits)):
            return []
        self.settle(bits)
        if self.metadata is None:
            compress(cuda.mark(bits, self.dtype), self.packed)
            return []
        return [cuda.metadata(bits, self.metadata)]

    def product(self, X_BC: Tensor, bias_R: Tensor | None) -> Tensor | None:
        """X · A^T + bias, or None where a packed copy has no plan for so many tokens."""
        if self.packed is None:
            return F.linear(X_BC, self.target, bias_R)
        plan = self.plan(X_BC.shape[0], bias_R is not None)
        return None if plan is None else plan.matmul(self.packed, X_BC, bias_R)

    def plan(self, tokens: int, bias: bool) -> Plan | None:
        """The plan of a packed copy for so many tokens; made at the first call, and None where there can be none."""
        key = tokens, bias
        if key not in self._plans:
            shape = Shape(self.rows, self.columns, tokens, self.dtype, bias)
            self._plans[key] = _apart(lambda: autotune.planned(shape, self.target.get_device()))
        return self._plans[key]


class Weight(NamedTuple):
    """What a layer saves of its weight: values (O, K), positions (O, I/8), positions_t (I, O/8)."""

    values: Tensor
    positions: Tensor
    positions_t: Tensor

    @property
    def sides(self) -> tuple[int, int]:
        return self.values.shape[0], self.positions_t.shape[0]


class _Targets(TypedDict, total=False):
    """What `cuda.refresh` has to write for a layer, by its words for it."""

    w: Tensor
    w_t: Tensor
    bias: Tensor
    bias_copy: Tensor


class Copies:
    """The copies of one layer in one dtype, made when a product first wants them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.forward: Operand | None = None
        self.backward: Operand | None = None
        self.bias: Tensor | None = None
        self._weight_stamp: object = None
        self._bias_stamp: object = None

    def linear(self, X_BI: Tensor, weight: Weight, bias_O: Tensor | None) -> Tensor:
        if self.forward is None and X_BI.shape[0] >= autotune.FEWEST_TOKENS:
            self._start_forward(weight, X_BI.shape[0], bias_O is not None)
        self.update(weight, bias_O)
        bias = bias_O if bias_O is None or bias_O.dtype == self.dtype else self.bias
        Y_BO = None if self.forward is None else self.forward.product(X_BI, bias)
        if Y_BO is None:  # too few tokens, or a count that has no plan: a dense copy for this once
            dense_OI = torch.empty(weight.sides, dtype=self.dtype, device=X_BI.device)
            cuda.launch(cuda.refresh(*weight, w=dense_OI))
            Y_BO = F.linear(X_BI, dense_OI, bias)
        return Y_BO

    def input_grad(self, dY_BO: Tensor, weight: Weight) -> Tensor:
        if self.backward is None and dY_BO.shape[0] >= autotune.FEWEST_TOKENS:
            self._start_backward(weight, dY_BO.shape[0])
        self.update(weight)
        dX_BI = None if self.backward is None else self.backward.product(dY_BO, None)
        if dX_BI is None:
            dense_IO = torch.empty(weight.sides[::-1], dtype=self.dtype, device=dY_BO.device)
            cuda.launch(cuda.refresh(*weight, w_t=dense_IO))
            dX_BI = F.linear(dY_BO, dense_IO)
        return dX_BI

    def prepare(self, weight: Weight, bias_O: Tensor | None, tokens: int, *, backward: bool) -> None:
        """Make everything that products of so many tokens will want."""
        if self.forward is None:
            self._start_forward(weight, tokens, bias_O is not None)
        if self.backward is None and backward:
            self._start_backward(weight, tokens)
        for side, bias in ((self.forward, bias_O is not None), (self.backward, False)):
            if side is not None and side.packed is not None:
                side.plan(tokens, bias)
        self.update(weight, bias_O)

    def _start_forward(self, weight: Weight, tokens: int, bias: bool) -> None:
        rows, columns = weight.sides
        shape = Shape(rows, columns, tokens, self.dtype, bias)
        self.forward = self._start(weight.positions, shape)

    def _start_backward(self, weight: Weight, tokens: int) -> None:
        rows, columns = weight.sides
        self.backward = self._start(weight.positions_t, Shape(columns, rows, tokens, self.dtype, False))

    def _start(self, bits: Tensor, shape: Shape) -> Operand:
        self._weight_stamp = None  # the new copy holds nothing yet
        device_index = bits.get_device()
        return _apart(lambda: Operand(bits, shape.columns, self.dtype, _choice(shape, device_index)))

    def update(self, weight: Weight, bias_O: Tensor | None = None) -> None:
        """Rewrite what is stale."""
        stamp = _stamp(*weight)
        bias_stamp = None if bias_O is None or bias_O.dtype == self.dtype else _stamp(bias_O)
        if stamp == self._weight_stamp and (bias_stamp is None or bias_stamp == self._bias_stamp):
            return
        for work in self.rewrite(weight, bias_O):
            cuda.launch(work)

    def rewrite(self, weight: Weight, bias_O: Tensor | None) -> list[cuda.Work]:
        """Everything that is there, as work that the caller must launch."""
        works = [] if self.forward is None else self.forward.follow(weight.positions)
        works += [] if self.backward is None else self.backward.follow(weight.positions_t)
        self._weight_stamp = _stamp(*weight)
        targets = self._targets(weight, bias_O)
        return [*works, cuda.refresh(*weight, **targets)] if targets else works

    def renew(self, weight: Weight, bias_O: Tensor | None) -> list[cuda.Work]:
        """The same with W^{R,C} chosen anew, into `weight.positions_t`."""
        backward = self.backward
        if backward is not None and backward.packed is not None and backward.metadata is None:
            cuda.launch(cuda.refresh(*weight, renew=True))  # at once: the library makes the metadata of what is chosen
            return self.rewrite(weight, bias_O)
        works = [] if self.forward is None else self.forward.follow(weight.positions)
        metadata = None if backward is None else backward.metadata
        works.append(cuda.refresh(*weight, renew=True, **self._targets(weight, bias_O), metadata=metadata))
        self.settle(weight)
        return works

    def _targets(self, weight: Weight, bias_O: Tensor | None) -> _Targets:
        targets: _Targets = {}
        if self.forward is not None:
            targets["w"] = self.forward.target
        if self.backward is not None:
            targets["w_t"] = self.backward.target
        bias_O = self._bias_to_convert(weight, bias_O)
        if bias_O is not None and self.bias is not None:
            targets |= {"bias": bias_O, "bias_copy": self.bias}
        return targets

    def settle(self, weight: Weight) -> None:
        """All is as `rewrite` and its launches leave it: a CUDA graph that was replayed holds these."""
        for side, bits in ((self.forward, weight.positions), (self.backward, weight.positions_t)):
            if side is not None:
                side.settle(bits)
        self._weight_stamp = _stamp(*weight)

    def _bias_to_convert(self, weight: Weight, bias_O: Tensor | None) -> Tensor | None:
        """The bias if the kernel shall convert it, which it can if it is of the weight's dtype."""
        if bias_O is None or bias_O.dtype == self.dtype:
            return None
        if self.bias is None:
            self.bias = _apart(lambda: torch.empty_like(bias_O, dtype=self.dtype))
        self._bias_stamp = _stamp(bias_O)
        if bias_O.dtype == weight.values.dtype:
            return bias_O
        self.bias.copy_(bias_O)
        return None


# By the address of `positions`, not by the tensor: a compiled graph may hand in another object over the same memory.
# The storage says whether that memory is still the same.
_COPIES: dict[tuple[int, torch.dtype], tuple[StorageWeakRef, Copies]] = {}
_steps = 0  # of all optimizers in this process


@functools.cache
def _watch_optimizers() -> None:
    def count(*_: object) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)


def find(positions: Tensor, dtype: torch.dtype) -> Copies | None:
    """The copies of the layer with these positions, if there are any."""
    entry = _COPIES.get((positions.data_ptr(), dtype))
    return None if entry is None or entry[0].expired() else entry[1]


def copies_of(positions: Tensor, dtype: torch.dtype) -> Copies:
    """The copies of the layer with these positions, empty at the first call."""
    copies = find(positions, dtype)
    if copies is None:
        _watch_optimizers()
        release()
        copies = Copies(dtype)
        _COPIES[positions.data_ptr(), dtype] = StorageWeakRef(positions.untyped_storage()), copies
    return copies


def release() -> None:
    """Free the copies of layers that are gone; done also whenever a new layer is met."""
    for key in [key for key, (storage, _) in _COPIES.items() if storage.expired()]:
        del _COPIES[key]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _stamp(*tensors: Tensor) -> tuple[int, ...]:
    """Another one when a tensor was written or replaced."""
    return _steps, *map(Tensor.data_ptr, tensors), *map(_version, tensors)


def _choice(shape: Shape, device_index: int) -> autotune.Choice:
    if _backend == "dense":
        return autotune.Choice(False, "backend=dense")
    choice, _ = autotune.choose(shape, device_index)
    if _backend == "cusparselt" and not choice.sparse and autotune.planned(shape, device_index):
        return autotune.Choice(True, "backend=cusparselt", choice.sparse_ms, choice.dense_ms, choice.algorithm)
    return choice

"""One product of a packed 2:4 matrix by cuSPARSELt: its plan, and packing a matrix for it.

    Y[B,R] = X[B,C] · A[R,C]^T + bias[R]        A: 2:4 along C, packed; X, Y: row-major, untouched

The library sees A row-major, X as its (C, B) transpose in column order and Y as (R, B) in column order, so nothing is
transposed and the bias of an output feature is the bias of a row. The forward product has A = W^R (R = out features),
the input gradient A = W^{R,C} transposed (R = in features, X = dY).

The metadata of a packed matrix (see formats.py) is made once for a mask, by compressing the matrix of
`cuda.slot_markers`, or by `cuda.metadata`; the values are then rewritten in place by `cuda.refresh`.
`kernel_choice.choose` does not trust this layout: it accepts a plan only if its product agrees with the dense one.
"""

import ctypes
import functools
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels import cuda, cusparselt, driver
from sparse_kernels.cusparselt import AlgorithmAttribute, Structure
from sparse_kernels.formats import FORMATS
from sparse_kernels.metadata_order import SIDES, MetadataOrder, find_order

_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)
_ONE_AT, _ZERO_AT = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)


@dataclass(frozen=True)
class MatmulShape:
    """One product: A is (rows, columns), X is (tokens, columns)."""

    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype
    bias: bool


class MatmulPlan:
    """A plan of the library with everything it points to, for one shape on one device.

    Raises:
        CuSparseLtError: no library, or it refuses the shape.
    """

    def __init__(self, shape: MatmulShape, device_index: int) -> None:
        self.shape, self._index = shape, device_index
        self._handle = cusparselt.handle(device_index)
        self._library = self._handle.library
        self._lock = threading.Lock()  # the bias pointer is part of the plan: setting it and running are one act
        self._bias_at, self._streams = 0, (ctypes.c_void_p * 1)()
        self._a = structured(shape.rows, shape.columns, shape.dtype, self._handle)
        self._x, self._y, self._product, self._algorithm, self._plan = (Structure() for _ in range(5))
        call, at, self._form = self._library.call, self._handle.address, FORMATS[shape.dtype]
        form = self._form
        result = FORMATS[form.result].data_type
        for matrix, rows, of in ((self._x, shape.columns, form.data_type), (self._y, shape.rows, result)):
            column = cusparselt.Order.COLUMN
            call("DenseDescriptorInit", at, matrix.address, rows, shape.tokens, rows, 16, of, column)
        operands = (self._a.address, self._x.address, self._y.address, self._y.address)
        keep, compute = cusparselt.NON_TRANSPOSE, cusparselt.COMPUTE_FLOAT32
        call("MatmulDescriptorInit", at, self._product.address, keep, keep, *operands, compute)
        if shape.bias:
            self._point_at_bias(torch.zeros(shape.rows, dtype=form.result, device=f"cuda:{device_index}"))
        default = cusparselt.ALGORITHM_DEFAULT
        call("MatmulAlgSelectionInit", at, self._algorithm.address, self._product.address, default)
        call("MatmulPlanInit", at, self._plan.address, self._product.address, self._algorithm.address)
        structures = (self._a, self._x, self._y, self._product, self._algorithm, self._plan)
        weakref.finalize(self, _destroy, self._library, structures).atexit = False
        self.workspace_bytes = self._workspace()

    def matmul(
        self, packed: Tensor, X_BC: Tensor, bias_R: Tensor | None = None, plus_BR: Tensor | None = None
    ) -> Tensor:
        """Y = X · A^T + bias + plus on torch's current stream.

        Args:
            packed: what `compress` returned for A.
            X_BC: (tokens, columns), contiguous, 16-byte aligned.
            bias_R: (rows,) of the result's dtype if the plan's shape has a bias, else None.
            plus_BR: (tokens, rows) of the result's dtype, contiguous; None for nothing.

        Returns:
            (tokens, rows), X's dtype, or bfloat16 of operands in fp8.
        """
        Y_BR = self._empty(X_BC)
        self._run("Matmul", packed, X_BC, bias_R, Y_BR, plus_BR)
        return Y_BR

    def search(self, packed: Tensor, X_BC: Tensor, bias_R: Tensor | None = None) -> dict[str, int]:
        """Time the library's algorithms on these operands, keep the fastest, and return its attributes."""
        self._run("MatmulSearch", packed, X_BC, bias_R, self._empty(X_BC))
        self.workspace_bytes = self._workspace()
        attributes, value = {}, ctypes.c_int()
        for attribute in AlgorithmAttribute:
            arguments = (attribute, ctypes.addressof(value), ctypes.sizeof(value))
            self._library.call("MatmulAlgGetAttribute", self._handle.address, self._algorithm.address, *arguments)
            attributes[attribute.name.lower()] = value.value
        return attributes

    def _empty(self, X_BC: Tensor) -> Tensor:
        return X_BC.new_empty(self.shape.tokens, self.shape.rows, dtype=self._form.result)

    def _workspace(self) -> int:
        (size,) = self._library.sizes("MatmulGetWorkspace", self._handle.address, self._plan.address, count=1)
        return size

    def _point_at_bias(self, bias_R: Tensor) -> None:
        pointer = ctypes.c_void_p(bias_R.data_ptr())
        arguments = (cusparselt.BIAS_POINTER, ctypes.addressof(pointer), ctypes.sizeof(pointer))
        self._library.call("MatmulDescSetAttribute", self._handle.address, self._product.address, *arguments)
        self._bias_at = bias_R.data_ptr()

    def _run(
        self,
        name: str,
        packed: Tensor,
        X_BC: Tensor,
        bias_R: Tensor | None,
        Y_BR: Tensor,
        plus_BR: Tensor | None = None,
    ) -> None:
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._index):
                return self._run(name, packed, X_BC, bias_R, Y_BR, plus_BR)
        # Torch's allocator hands the workspace out anew each time: safe on every stream and inside a captured graph.
        size = self.workspace_bytes
        workspace = torch.empty(size, dtype=torch.uint8, device=X_BC.device) if size else None
        at_workspace = None if workspace is None else workspace.data_ptr()
        at, plan, y = self._handle.address, self._plan.address, Y_BR.data_ptr()
        times, plus = (_ZERO_AT, y) if plus_BR is None else (_ONE_AT, plus_BR.data_ptr())
        operands = (_ONE_AT, packed.data_ptr(), X_BC.data_ptr(), times, plus, y, at_workspace, self._streams, 1)
        with self._lock:
            if bias_R is not None and bias_R.data_ptr() != self._bias_at:
                self._point_at_bias(bias_R)
            self._streams[0] = driver.raw_stream(self._index)
            status = self._library.functions[name](at, plan, *operands)
        if status:
            self._library.fail(name, status)


def _destroy(library: cusparselt.Library, structures: tuple[Structure, ...]) -> None:
    *matrices, _, algorithm, plan = structures
    library.functions["MatmulPlanDestroy"](plan.address)
    library.functions["MatmulAlgSelectionDestroy"](algorithm.address)
    for matrix in matrices:
        library.functions["MatDescriptorDestroy"](matrix.address)


def structured(rows: int, columns: int, dtype: torch.dtype, handle: cusparselt.Handle) -> Structure:
    """The library's descriptor of a 2:4 matrix (rows, columns), row-major."""
    matrix = Structure()
    arguments = (
        rows,
        columns,
        columns,
        16,
        FORMATS[dtype].data_type,
        cusparselt.Order.ROW,
        cusparselt.SPARSITY_50_PERCENT,
    )
    handle.library.call("StructuredDescriptorInit", handle.address, matrix.address, *arguments)
    return matrix


def compress(dense_RC: Tensor, packed: Tensor | None = None) -> Tensor:
    """Pack a 2:4 matrix, into `packed` if it is given.

    Args:
        dense_RC: (R, C), of a format's dtype; it decides by its non-zeros where the slots are.

    Returns:
        uint8, [values | metadata].
    """
    rows, columns = dense_RC.shape
    handle = cusparselt.handle(dense_RC.device.index)
    matrix = structured(rows, columns, dense_RC.dtype, handle)
    try:
        size, buffer_size = handle.library.sizes("SpMMACompressedSize2", handle.address, matrix.address, count=2)
        if packed is None:
            packed = torch.empty(size, dtype=torch.uint8, device=dense_RC.device)
        buffer = torch.empty(buffer_size, dtype=torch.uint8, device=dense_RC.device)
        pointers = (dense_RC.data_ptr(), packed.data_ptr(), buffer.data_ptr())
        with torch.cuda.device(dense_RC.device):
            stream = driver.raw_stream(dense_RC.device.index)
            arguments = (1, cusparselt.NON_TRANSPOSE, *pointers, stream)
            handle.library.call("SpMMACompress2", handle.address, matrix.address, *arguments)
    finally:
        handle.library.functions["MatDescriptorDestroy"](matrix.address)
    return packed


@functools.cache
def metadata_order(dtype: torch.dtype, device_index: int) -> MetadataOrder | None:
    """The order of fp8's metadata, which is another one than that of 16 bits; None for these, or if none is found.

    The library does not document it: it is found by packing.
    """
    form, device = FORMATS[dtype], torch.device("cuda", device_index)
    if not form.scaled:
        return None

    def write(bits: Tensor) -> Tensor:
        packed = compress(cuda.slot_markers(bits.to(device).contiguous(), dtype))
        return form.metadata(packed, *SIDES)

    return find_order(write)


@functools.cache
def order_table(dtype: torch.dtype, device_index: int) -> Tensor | None:
    """The same as `cuda.metadata` takes it."""
    order = metadata_order(dtype, device_index)
    return None if order is None else torch.tensor(order.table(), dtype=torch.int32, device=f"cuda:{device_index}")


@functools.cache
def writes_metadata(rows: int, columns: int, dtype: torch.dtype, device_index: int) -> bool:
    """Whether `cuda.metadata` writes a matrix's metadata as the library does: tried on a random mask.

    The library does not document that order, and it may differ for odd sides, another GPU or another version. Then a
    new mask is packed by the library.
    """
    order = metadata_order(dtype, device_index)
    if FORMATS[dtype].scaled and order is None:
        return False
    high, wide = (64, 32) if order is None else order.tile
    if rows % high or columns % wide:
        return False
    device = torch.device("cuda", device_index)
    bits = random_mask(rows, columns, torch.Generator(device).manual_seed(0))
    theirs = FORMATS[dtype].metadata(compress(cuda.slot_markers(bits, dtype)), rows, columns)
    ours = torch.empty_like(theirs)
    cuda.launch(cuda.metadata(bits, ours, order_table(dtype, device_index)))
    return torch.equal(ours, theirs)


def random_mask(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """The bits of a random 2:4 mask: uint8 (rows, columns/8), on the device of the generator."""
    pairs = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=generator.device)
    sides = (2, rows, columns // 8)
    low, high = pairs[torch.randint(6, sides, device=generator.device, generator=generator)].unbind()
    return low | high << 4

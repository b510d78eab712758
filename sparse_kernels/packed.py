"""The packed weights that a 2:4 layer's products on a GPU read, in 16 or 8 bits: derived from `values`, never saved.

    PackedWeight   one 2:4 matrix in one format, packed for cuSPARSELt or dense for cuBLAS, as measured; `matmul(X)`
    PackedLayer    a layer's two (W^R and W^{R,C} transposed) and its 16-bit bias; `refresh` rewrites them in place

In fp8 both have the scale of W^R (operands.py). A product there is that of the operands' data, without a bias: the
library multiplies results by nothing, so whoever called does, where torch's compiler fuses it with what follows.

A PackedLayer belongs to its layer: it hangs on the storage of the layer's row mask, which is made, moved and freed with
the layer. A custom op in a compiled graph gets tensors and no layer; it finds its PackedLayer there too, whatever
Python object it is handed over that storage. After `share` several layers have the same one, and take turns in it.

It is stale when a tensor that it comes from was written or replaced, any optimizer has stepped (torch's fused
optimizers count no versions), or another layer has had its turn: `LayerWeight.stamps` says so, in one place. Whoever
replays a CUDA graph counts the versions of the tensors that the graph writes (torch.autograd.graph.increment_version).

Shape suffixes: B tokens, O out features, I in features, K = I/2 kept entries of a row; R rows, C columns of a matrix.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_kernels import cuda, kernel_choice
from sparse_kernels.formats import FORMATS, PackedFormat
from sparse_kernels.kernel_choice import Choice
from sparse_kernels.matmul_plan import MatmulPlan, MatmulShape, compress, order_table, writes_metadata
from sparse_kernels.operands import scale_of

Backend = Literal["auto", "cusparselt", "dense", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "cusparselt", "dense", "reference")

Product = Literal["linear", "input_grad"]
"""The products that read packed weights: `linear` W^R and the bias, `input_grad` W^{R,C}."""
PRODUCTS: tuple[Product, ...] = ("linear", "input_grad")

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------------------
# Freshness


class Stamp(NamedTuple):
    """A tensor as it was: another one once it is written or replaced."""

    address: int
    version: int


def stamp(tensor: Tensor) -> Stamp:
    """The stamp of a tensor now. Inference tensors count no versions; they are not written outside inference mode."""
    return Stamp(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)


class Derived(NamedTuple):
    """A tensor that was computed from a buffer, and the buffer's stamp then."""

    tensor: Tensor
    stamp: Stamp

    @classmethod
    def of(cls, tensor: Tensor, buffer: Tensor) -> "Derived":
        return cls(tensor, stamp(buffer))

    def is_of(self, buffer: Tensor) -> bool:
        """Whether the buffer is still as it was."""
        return self.stamp == stamp(buffer)


_steps = 0  # of all optimizers in this process


@functools.cache
def _count_steps() -> None:
    def count(*_: object) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)


# ---------------------------------------------------------------------------------------------------------------------
# One matrix


class PackedWeight:
    """A 2:4 matrix A (R, C), packed or dense as `choice` says, rewritten in place.

    Attributes:
        target: what `cuda.refresh` writes: (R, C/2), the values of the packed matrix, or (R, C) dense.
        metadata: the packed matrix's metadata where the kernels can write it, else None.
    """

    def __init__(self, mask_bits: Tensor, columns: int, form: PackedFormat, choice: Choice) -> None:
        self.rows, self.columns, self.format, self.choice = mask_bits.shape[0], columns, form, choice
        self.metadata: Tensor | None = None
        self._order: Tensor | None = None
        self._packed: Tensor | None = None
        self._plans: dict[tuple[int, bool], MatmulPlan | None] = {}
        self._mask = stamp(mask_bits)
        if choice.sparse:
            self._packed = compress(cuda.slot_markers(mask_bits, form.dtype))
            if writes_metadata(self.rows, columns, form.dtype, mask_bits.get_device()):
                self.metadata = form.metadata(self._packed, self.rows, columns)
                self._order = order_table(form.dtype, mask_bits.get_device())
            self.target = form.values(self._packed, self.rows, columns)
        else:
            self.target = torch.empty(self.rows, columns, dtype=form.dtype, device=mask_bits.device)

    @property
    def packed(self) -> bool:
        """Whether the matrix is packed for cuSPARSELt."""
        return self._packed is not None

    def matmul(self, X_BC: Tensor, bias_R: Tensor | None) -> Tensor | None:
        """X · A^T + bias, (B, R); None if there is no plan for this number of tokens."""
        if self._packed is None:
            return kernel_choice.dense(X_BC, self.target, bias_R)
        plan = self.plan(X_BC.shape[0], bias_R is not None)
        return None if plan is None else plan.matmul(self._packed, X_BC, bias_R)

    def plan(self, tokens: int, bias: bool) -> MatmulPlan | None:
        """The library's plan for this number of tokens, made at the first call; None if none is possible."""
        key = tokens, bias
        if self._packed is not None and key not in self._plans:
            shape = MatmulShape(self.rows, self.columns, tokens, self.format.dtype, bias)
            self._plans[key] = outside_graphs(lambda: kernel_choice.plan_for(shape, self.target.get_device()))
        return self._plans.get(key)

    def update_metadata(self, mask_bits: Tensor) -> list[cuda.KernelLaunch]:
        """Rewrite the metadata if the mask has changed: by launches, returned for the caller to do, or at once."""
        if self._packed is None or self._mask == stamp(mask_bits):
            return []
        self.mask_is(mask_bits)
        if self.metadata is not None:
            return [cuda.metadata(mask_bits, self.metadata, self._order)]
        compress(cuda.slot_markers(mask_bits, self.format.dtype), self._packed)
        return []

    @property
    def metadata_of_update(self) -> Tensor | None:
        """The metadata where the kernel that updates a mask can write it at once: in the order of 16 bits."""
        return None if self._order is not None else self.metadata

    def mask_is(self, mask_bits: Tensor) -> None:
        """Note that the metadata is, or is about to be, that of this mask as it is now."""
        self._mask = stamp(mask_bits)


def outside_graphs(make: Callable[[], T]) -> T:
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


# ---------------------------------------------------------------------------------------------------------------------
# One layer


class LayerWeight(NamedTuple):
    """The tensors that a layer's packed weights come from.

    values (O, K), row_mask_bits (O, I/8), backward_mask_bits (I, O/8), bias (O,) or None.
    """

    values: Tensor
    row_mask_bits: Tensor
    backward_mask_bits: Tensor
    bias: Tensor | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """(O, I)."""
        return self.values.shape[0], self.backward_mask_bits.shape[0]

    def stamps(self, product: Product) -> tuple[object, ...]:
        """The optimizer steps so far, and the stamps of the tensors from which a product's operand is written.

        The row mask's address says whose they are: `values` that are gathered for a block may lie where another
        layer's lay before.
        """
        own = self.bias if product == "linear" else self.backward_mask_bits
        return _steps, stamp(self.row_mask_bits), stamp(self.values), None if own is None else stamp(own)


class _Targets(TypedDict, total=False):
    """What `cuda.refresh` is to write for a layer, and by what it multiplies, by its parameters' names."""

    w: Tensor
    w_t: Tensor
    bias: Tensor
    bias_out: Tensor
    factor: Tensor | None


class PackedLayer:
    """The packed weights of one layer in one format, each made when a product first needs it.

    Where layers take turns (`share`), each product of each layer writes what it reads, and that alone.

    Attributes:
        forward: of W^R.
        backward: of W^{R,C} transposed.
        shared: whether layers take turns.
    """

    def __init__(self, form: PackedFormat, backend: Backend, *, shared: bool = False) -> None:
        self.format, self.backend, self.shared = form, backend, shared
        self.forward: PackedWeight | None = None
        self.backward: PackedWeight | None = None
        self._scales: Tensor | None = None
        self._bias: Tensor | None = None
        self._dense: Tensor | None = None
        self._stamps: dict[Product, tuple[object, ...]] = {}
        self._dense_of: tuple[Stamp, ...] = ()

    # -------------------------------------------------------------------------------------------------- products

    def linear(self, X_BI: Tensor, weight: LayerWeight) -> Tensor:
        """X · W^R^T + bias, (B, O)."""
        if self.forward is None and X_BI.shape[0] >= kernel_choice.FEWEST_TOKENS:
            self._make_forward(weight, X_BI.shape[0])
        self._refresh_if_stale(weight, "linear")
        bias_O = weight.bias if weight.bias is None or weight.bias.dtype == self.format.result else self._bias
        Y_BO = None if self.forward is None else self.forward.matmul(X_BI, bias_O)
        if Y_BO is None:  # too few tokens, or a count without a plan: a temporary dense matrix
            dense_OI = torch.empty(weight.sides, dtype=self.format.dtype, device=X_BI.device)
            cuda.launch(cuda.refresh(*weight[:3], w=dense_OI, factor=self._factor))
            Y_BO = kernel_choice.dense(X_BI, dense_OI, bias_O)  # [B,I] · [O,I]^T -> [B,O]
        return Y_BO

    def input_grad(self, dY_BO: Tensor, weight: LayerWeight) -> Tensor:
        """dY · W^{R,C}, (B, I)."""
        if self.backward is None and dY_BO.shape[0] >= kernel_choice.FEWEST_TOKENS:
            self._make_backward(weight, dY_BO.shape[0])
        self._refresh_if_stale(weight, "input_grad")
        dX_BI = None if self.backward is None else self.backward.matmul(dY_BO, None)
        if dX_BI is None:
            dense_IO = torch.empty(weight.sides[::-1], dtype=self.format.dtype, device=dY_BO.device)
            cuda.launch(cuda.refresh(*weight[:3], w_t=dense_IO, factor=self._factor))
            dX_BI = kernel_choice.dense(dY_BO, dense_IO)  # [B,O] · [I,O]^T -> [B,I]
        return dX_BI

    def exact_input_grad(self, dY_BO: Tensor, weight: LayerWeight) -> Tensor:
        """dY · W^R, (B, I), by a dense copy that is kept: for frozen layers, whose values do not change."""
        return dY_BO @ self.dense(weight)  # [B,O] · [O,I] -> [B,I]

    def dense(self, weight: LayerWeight) -> Tensor:
        """W^R of a frozen layer as a dense matrix (O, I), kept while the values, which no optimizer writes, are."""
        if self._dense is None:
            device, dtype = weight.values.device, self.format.dtype
            self._dense = outside_graphs(lambda: torch.empty(weight.sides, dtype=dtype, device=device))
        if self._dense_of != (now := (stamp(weight.row_mask_bits), stamp(weight.values))):
            cuda.launch(cuda.refresh(*weight[:3], w=self._dense))
            self._dense_of = now
        return self._dense

    # ------------------------------------------------------------------------------------------------- freshness

    def prepare(self, weight: LayerWeight, tokens: int, *, backward: bool) -> None:
        """Make everything that products of this number of tokens need."""
        if self.forward is None:
            self._make_forward(weight, tokens)
        if self.backward is None and backward:
            self._make_backward(weight, tokens)
        for matrix, bias in ((self.forward, weight.bias is not None), (self.backward, False)):
            if matrix is not None:
                matrix.plan(tokens, bias)
        for which in PRODUCTS[: 2 if backward else 1]:
            self._refresh_if_stale(weight, which)

    def refresh(self, weight: LayerWeight, products: Sequence[Product] = PRODUCTS) -> list[cuda.KernelLaunch]:
        """The launches, for the caller to do, that write what these products read from the present tensors.

        In fp8 by the scales that `rescale` has computed from them.
        """
        launches: list[cuda.KernelLaunch] = []
        if "linear" in products and self.forward is not None:
            launches += self.forward.update_metadata(weight.row_mask_bits)
        if "input_grad" in products and self.backward is not None:
            launches += self.backward.update_metadata(weight.backward_mask_bits)
        self._stamps |= {product: weight.stamps(product) for product in products}
        targets = self._targets(weight, products)
        written = targets.keys() - {"factor"}
        return [*launches, cuda.refresh(*weight[:3], **targets)] if written else launches

    def refresh_if_stale(self, weight: LayerWeight, product: Product) -> list[cuda.KernelLaunch]:
        """The same, if what a product reads is stale: for both products in one reading, but of layers that take turns.

        Raises:
            RuntimeError: a CUDA graph is being captured of layers that take turns: a replay would not see whose it is.
        """
        if self.shared and weight.values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("layers that share their packed weights cannot be captured in a CUDA graph")
        if self._stamps.get(product) == weight.stamps(product):
            return []
        rescale([(self, weight)])
        return self.refresh(weight, (product,) if self.shared else PRODUCTS)

    def update_mask(self, weight: LayerWeight) -> list[cuda.KernelLaunch]:
        """As `refresh` with W^{R,C} chosen again by magnitude first, into `weight.backward_mask_bits`.

        After these launches `follow_mask` is to be called.
        """
        backward = self.backward
        if backward is not None and backward.packed and backward.metadata is None:
            # The library makes the metadata of the mask, so the mask must be there.
            cuda.launch(cuda.refresh(*weight[:3], update_mask=True))
            return self.refresh(weight)
        launches = [] if self.forward is None else self.forward.update_metadata(weight.row_mask_bits)
        metadata = None if backward is None else backward.metadata_of_update
        targets = self._targets(weight, PRODUCTS)
        launches.append(cuda.refresh(*weight[:3], update_mask=True, **targets, metadata=metadata))
        if backward is not None and metadata is not None:
            backward.mask_is(weight.backward_mask_bits)
        self._stamps = {product: weight.stamps(product) for product in PRODUCTS}
        return launches

    def follow_mask(self, weight: LayerWeight) -> list[cuda.KernelLaunch]:
        """The launches that write the metadata of W^{R,C}'s new mask where those of `update_mask` have not."""
        return [] if self.backward is None else self.backward.update_metadata(weight.backward_mask_bits)

    def _refresh_if_stale(self, weight: LayerWeight, product: Product) -> None:
        for launch in self.refresh_if_stale(weight, product):
            cuda.launch(launch)

    @property
    def scales(self) -> Tensor:
        """That of the weights in fp8 and its reciprocal, float32 (2,), which `rescale` writes."""
        if self._scales is None:
            self._scales = outside_graphs(lambda: torch.empty(2, device="cuda"))
        return self._scales

    @property
    def scale(self) -> Tensor:
        """That of the weights in fp8, a copy of float32 ()."""
        return self.scales[0].clone()

    @property
    def _factor(self) -> Tensor | None:
        return None if self._scales is None else self._scales[1]

    def _targets(self, weight: LayerWeight, products: Sequence[Product]) -> _Targets:
        targets: _Targets = {"factor": self._factor} if self.format.scaled else {}
        if "input_grad" in products and self.backward is not None:
            targets["w_t"] = self.backward.target
        if "linear" not in products:
            return targets
        if self.forward is not None:
            targets["w"] = self.forward.target
        if (bias_O := weight.bias) is not None and bias_O.dtype != self.format.result:
            if self._bias is None:
                self._bias = outside_graphs(lambda: torch.empty_like(bias_O, dtype=self.format.result))
            if bias_O.dtype == weight.values.dtype:  # the kernel converts a bias of the values' dtype
                targets |= {"bias": bias_O, "bias_out": self._bias}
            else:
                self._bias.copy_(bias_O)
        return targets

    def _make_forward(self, weight: LayerWeight, tokens: int) -> None:
        rows, columns = weight.sides
        shape = MatmulShape(rows, columns, tokens, self.format.dtype, weight.bias is not None)
        self.forward = self._make(weight.row_mask_bits, shape)

    def _make_backward(self, weight: LayerWeight, tokens: int) -> None:
        columns, rows = weight.sides
        shape = MatmulShape(rows, columns, tokens, self.format.dtype, bias=False)
        self.backward = self._make(weight.backward_mask_bits, shape)

    def _make(self, mask_bits: Tensor, shape: MatmulShape) -> PackedWeight:
        self._stamps = {}  # the new matrix holds nothing yet
        device_index = mask_bits.get_device()
        return outside_graphs(
            lambda: PackedWeight(mask_bits, shape.columns, self.format, _choice(shape, device_index, self.backend))
        )


def rescale(layers: Iterable[tuple[PackedLayer, LayerWeight]]) -> None:
    """Compute the scales of fp8 from the present values: of all layers at once, in a few launches."""
    by_device: dict[torch.device, list[tuple[PackedLayer, LayerWeight]]] = {}
    for packed, weight in layers:
        if packed.format.scaled:
            by_device.setdefault(weight.values.device, []).append((packed, weight))
    for device, same in by_device.items():
        with torch.cuda.device(device):
            largest = torch._foreach_norm([weight.values.detach() for _, weight in same], float("inf"))
            scales = scale_of(torch.stack(largest))
            pairs = torch.stack([scales, scales.reciprocal()], dim=1)
            torch._foreach_copy_([packed.scales for packed, _ in same], list(pairs.unbind()))


def _choice(shape: MatmulShape, device_index: int, backend: Backend) -> Choice:
    if backend == "dense":
        return Choice(False, "backend=dense")
    choice, _ = kernel_choice.choose(shape, device_index)
    if backend == "cusparselt" and not choice.sparse and kernel_choice.plan_for(shape, device_index):
        return Choice(True, "backend=cusparselt", choice.sparse_ms, choice.dense_ms, choice.algorithm)
    return choice


# ---------------------------------------------------------------------------------------------------------------------
# Ownership


class _Owned(dict[torch.dtype, PackedLayer]):
    """PackedLayers by dtype: an attribute of the storage of a row mask, or of those of layers that take turns."""

    shared = False


def _owned(row_mask_bits: Tensor) -> _Owned:
    owned: _Owned = row_mask_bits.untyped_storage().__dict__.setdefault("packed_layers", _Owned())
    return owned


def packed_layer(row_mask_bits: Tensor, dtype: torch.dtype, backend: Backend) -> PackedLayer:
    """The packed weights of the layer with this row mask, empty at the first call."""
    owned = _owned(row_mask_bits)
    packed = owned.get(dtype)
    if packed is None or packed.backend != backend:
        _count_steps()
        packed = owned[dtype] = PackedLayer(FORMATS[dtype], backend, shared=owned.shared)
    return packed


def packed_layers(row_mask_bits: Tensor) -> list[PackedLayer]:
    """All packed weights of the layer with this row mask."""
    return list(_owned(row_mask_bits).values())


def free(row_mask_bits: Tensor, *, scaled: bool) -> None:
    """Free the packed weights of the layer with this row mask in formats with scales (fp8), or in those without."""
    owned = _owned(row_mask_bits)
    for dtype in [dtype for dtype, packed in owned.items() if packed.format.scaled == scaled]:
        del owned[dtype]


def share(row_masks: Iterable[Tensor]) -> None:
    """Let the layers with these row masks, all of the same sides, take turns in the same packed weights from now on.

    Safe in any order of products on one stream: each of them writes what it reads if another layer was there before.
    """
    owned = _Owned()
    owned.shared = True
    for row_mask_bits in row_masks:
        row_mask_bits.untyped_storage().__dict__["packed_layers"] = owned

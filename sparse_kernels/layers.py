"""The sparse layers of a whole model: finding them, updating their masks, and their packed weights on a GPU."""

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_kernels import cuda, cusparselt, kernel_choice, masks, ops
from sparse_kernels.deprecated import renamed_arguments
from sparse_kernels.formats import E4M3, FORMATS
from sparse_kernels.masked_linear import masked_layers
from sparse_kernels.matmul_plan import MatmulShape
from sparse_kernels.packed import (
    BACKENDS,
    Backend,
    LayerWeight,
    PackedLayer,
    packed_layer,
    packed_layers,
    rescale,
    share,
)
from sparse_kernels.sharded import local, local_rows, whole_of
from sparse_kernels.sparse_linear import SparseLinear


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """(name, layer) of every SparseLinear in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear))


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for each layer of a model, the same in every process."""
    return seed ^ zlib.crc32(name.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Masks


@torch.no_grad()
def update_backward_masks(model: nn.Module, kind: str = "magnitude", seed: int = 0) -> None:
    """Choose W^{R,C} of every sparse layer again; W^R's masks stay. Packed weights follow at once.

    Args:
        kind: "magnitude" of the present values, or "random" among the kept entries.
        seed: of the random choice; give another at each update.
    """
    chosen: list[SparseLinear] = []
    launches: list[cuda.KernelLaunch] = []
    stale: list[tuple[SparseLinear, PackedLayer]] = []
    # What is shared follows at its next product.
    own = {name: [one for one in _packed_layers(layer) if not one.shared] for name, layer in sparse_layers(model)}
    rescale((one, _weight(layer, one)) for name, layer in sparse_layers(model) for one in own[name])
    follow: list[tuple[PackedLayer, LayerWeight]] = []
    for name, layer in sparse_layers(model):
        packed = own[name]
        if layer.kernel_chooses(kind):
            chosen.append(layer)
            if packed:
                follow.append((packed[0], _weight(layer, packed[0])))
                launches += packed[0].update_mask(follow[-1][1])
            else:
                bits = layer.row_mask_bits, layer.backward_mask_bits
                launches.append(cuda.refresh(layer.values, *bits, update_mask=True))
            packed = packed[1:]
        else:
            layer.update_backward_mask(kind, layer_seed(seed, name))
        stale += [(layer, other) for other in packed]
    cuda.launch_all(launches)
    cuda.launch_all(launch for one, weight in follow for launch in one.follow_mask(weight))
    cuda.launch_all(launch for layer, packed in stale for launch in packed.refresh(_weight(layer, packed)))
    for layer in chosen:
        layer.update_backward_scale()


@torch.no_grad()
def update_row_masks(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    share: float = 1.0,
    moments: Callable[[nn.Parameter], Iterable[Tensor]] = lambda _: (),
) -> None:
    """Let the row mask of every sparse layer follow the gradient (`masks.drop_and_grow`), in place.

    Entries that join begin at 0. The backward masks are to be updated next: some keep entries that are gone.

    Args:
        gradients: of the dense weights, (out, in), by the layers' names, whole; see `dense_gradients`.
        share: of the kept entries of each row, at most, that lose their place.
        moments: of a parameter, what an optimizer keeps in its shape: it moves with the entries, and begins at 0, too.
    """
    for name, layer in sparse_layers(model):
        values_RK, rows = local(layer.values), local_rows(layer.values)
        mask_RI = masks.unpack_bits(layer.row_mask_bits[rows], layer.in_features)
        W_RI, n, m = masks.scatter(values_RK, mask_RI), layer.n, layer.m
        grown_RI = masks.drop_and_grow(W_RI, mask_RI, gradients[name][rows], n, m, share)
        for kept_RK in (values_RK, *map(local, moments(layer.values))):
            kept_RK.copy_(masks.scatter(kept_RK, mask_RI)[grown_RI].view_as(kept_RK))
        layer.row_mask_bits.copy_(whole_of(masks.pack_bits(grown_RI), layer.values))


def dense_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of a loss with respect to every sparse layer's weight as a dense matrix, pruned entries included.

    No parameter's own gradient is touched. Compiled blocks run uncompiled.

    Args:
        loss: called once; runs the model and returns the loss, (), with its graph.

    Returns:
        (out, in) float32 for each layer by its name, of the tokens of this process alone.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], Y: Tensor) -> None:
            inputs[name], outputs[name] = given[0].detach(), Y

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in sparse_layers(model)]
    try:
        with torch.compiler.set_stance("force_eager"):
            value = loss()
    finally:
        for handle in handles:
            handle.remove()
    given = torch.autograd.grad(value, list(outputs.values()), materialize_grads=True)
    found = {}
    for (name, X), dY in zip(inputs.items(), given, strict=True):
        dY_BO = dY.reshape(-1, dY.shape[-1])
        X_BI = X.reshape(-1, X.shape[-1]).to(dY.dtype)
        found[name] = (dY_BO.t() @ X_BI).float()  # [O,B] · [B,I] -> [O,I]
    return found


@renamed_arguments
def update_masks(model: nn.Module, *, backward: str = "magnitude", seed: int = 0) -> None:
    """Update the masks that may change in each step: W^{R,C} of sparse layers, and the masks of masked ones.

    Args:
        backward, seed: kind and seed for `update_backward_masks`; masked layers go by their present magnitudes.
    """
    update_backward_masks(model, backward, seed)
    for _, layer in masked_layers(model):
        layer.update_mask()


def mask_buffers(model: nn.Module) -> list[Tensor]:
    """Every buffer that `update_masks` writes."""
    own = [layer.backward_mask_bits for _, layer in sparse_layers(model)]
    return [*own, *(layer.mask for _, layer in masked_layers(model))]


# ---------------------------------------------------------------------------------------------------------------------
# How the products are computed


def set_backend(model: nn.Module, backend: Backend) -> None:
    """Choose how the 2:4 layers of a model are computed on a GPU.

    Args:
        backend: "auto" takes for each product what was measured to be faster; "cusparselt" and "dense" take that one
            wherever it is possible; "reference" is plain torch, as on a CPU.

    Raises:
        ValueError, CuSparseLtError: as `check_backend`.
    """
    check_backend(backend)
    for _, layer in sparse_layers(model):
        layer.backend = backend


def check_backend(backend: str) -> None:
    """Whether a GPU of this machine can be used with this backend.

    Raises:
        ValueError: an unknown backend.
        CuSparseLtError: "cusparselt", and the library is missing or too old.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "cusparselt":
        cusparselt.library()


@contextlib.contextmanager
def using_backend(model: nn.Module, backend: Backend) -> Iterator[None]:
    """Within it the 2:4 layers of a model are computed in this way, but for those that stay on "reference"."""
    layers = [layer for _, layer in sparse_layers(model) if layer.backend != "reference"]
    before = [layer.backend for layer in layers]
    try:
        for layer in layers:
            layer.backend = backend
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.backend = old


@contextlib.contextmanager
def dense_weights(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within it, and without gradients, sparse layers multiply by dense copies of their W^R, made once, here.

    For decoding: of one token, or a few, a product takes far less time than making the dense weight for it. The weights
    must not change within it.

    Args:
        dtype: of the products: the autocast dtype under autocast.
    """
    # A layer of which this process has only some rows stays as it is.
    layers = [layer for _, layer in sparse_layers(model) if not isinstance(layer.values, DTensor)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.dense_weight = layer.scattered(dtype)
        yield
    finally:
        for layer in layers:
            layer.dense_weight = None


def measure_kernels(model: nn.Module, tokens: int, dtype: torch.dtype) -> None:
    """Decide for every product of the 2:4 layers, for this number of tokens, whether it runs sparse or dense.

    Nothing is packed, and of the weights only the shapes matter: they may be split over processes.
    """
    for _, layer in sparse_layers(model):
        if layer.values.is_cuda and layer.backend != "reference" and (layer.n, layer.m) == (2, 4) and dtype in FORMATS:
            sides, device = (layer.out_features, layer.in_features), layer.values.get_device()
            biased = layer.bias is not None and not FORMATS[dtype].scaled
            kernel_choice.choose(MatmulShape(*sides, tokens, dtype, biased), device)
            kernel_choice.choose(MatmulShape(*sides[::-1], tokens, dtype, bias=False), device)


def _weight(layer: SparseLinear, packed: PackedLayer) -> LayerWeight:
    """What these packed weights come from: in fp8 the product has no bias."""
    bias_O = None if packed.format.scaled else layer.bias
    return LayerWeight(layer.values, layer.row_mask_bits, layer.backward_mask_bits, bias_O)


def _packed_layers(layer: SparseLinear) -> list[PackedLayer]:
    """Those that the kernels can write from the layer's values; after a cast of the model, not those from before it."""
    writable = FORMATS if layer.values.dtype == torch.float32 else (layer.values.dtype,)
    return [packed for packed in packed_layers(layer.row_mask_bits) if packed.format.dtype in writable]


def _all_packed(model: nn.Module) -> Iterator[tuple[str, SparseLinear, PackedLayer]]:
    """(name, layer, packed weights), for each format that a layer has run in."""
    return ((name, layer, packed) for name, layer in sparse_layers(model) for packed in _packed_layers(layer))


@torch.no_grad()
def prepare(model: nn.Module, tokens: int, dtype: torch.dtype = torch.bfloat16, *, backward: bool = True) -> None:
    """Measure and allocate now what the sparse layers on a GPU otherwise would at their first products.

    Needed before products are captured in a CUDA graph without a first step outside of one, as torch.compile with
    mode="reduce-overhead" does where it reuses a graph for a second model or block.

    Args:
        tokens: rows of the layers' inputs, all but the last side multiplied; fewer than 256 prepare nothing.
        dtype: of the products, bfloat16 or float16. A layer in training that multiplies in fp8 is prepared for that.
        backward: for the input gradient too.
    """
    for _, layer in sparse_layers(model):
        if (layer.n, layer.m) not in ops.TWO_OF_FOUR or tokens < kernel_choice.FEWEST_TOKENS:
            continue
        fp8, probe = layer.training and layer.fp8_counts is not None, layer.values.new_empty(0, dtype=dtype)
        how = layer.values, layer.backend
        if ops.fast_fp8(*how) if fp8 else ops.fast(probe, *how):
            packed = packed_layer(layer.row_mask_bits, E4M3.dtype if fp8 else dtype, layer.backend)
            packed.prepare(_weight(layer, packed), tokens, backward=backward)


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Rewrite the packed weights of every sparse layer from its values and masks, in place, in a launch or two.

    Needed after the optimizer's step where the products are replayed from a CUDA graph, which cannot see that packed
    weights are stale, unless an update of the backward masks follows, which does this too. It may itself be captured,
    after the step, if the packed weights are fresh then or the graph is replayed before the next eager product.
    Elsewhere the layers do this on their own; those that share packed weights always do.
    """
    own = [(packed, _weight(layer, packed)) for _, layer, packed in _all_packed(model) if not packed.shared]
    rescale(own)
    cuda.launch_all(launch for packed, weight in own for launch in packed.refresh(weight))


def alike(model: nn.Module) -> list[list[SparseLinear]]:
    """The sparse layers in groups: of one device and the same sides, all with a bias or all without."""
    groups: dict[tuple[object, ...], list[SparseLinear]] = {}
    for _, layer in sparse_layers(model):
        kind = layer.row_mask_bits.device, layer.out_features, layer.in_features, layer.bias is not None
        groups.setdefault(kind, []).append(layer)
    return list(groups.values())


def share_packed(model: nn.Module) -> None:
    """Let the sparse layers of a model that are `alike` share one another's packed weights from now on.

    The model then holds those of one layer of each kind, and each product writes what it reads first, unless the same
    layer was the last: for weights that are gathered for each pass, as in FSDP. Call it again for layers that join, or
    move to another device. Such layers cannot be captured in a CUDA graph: their products raise RuntimeError then.
    """
    for group in alike(model):
        share(layer.row_mask_bits for layer in group)


@dataclass(frozen=True)
class LayerBackend:
    """How one layer's two sparse products run. None: no product of this kind has run yet."""

    name: str
    dtype: torch.dtype
    forward: kernel_choice.Choice | None
    input_grad: kernel_choice.Choice | None


def backends(model: nn.Module) -> list[LayerBackend]:
    """What was chosen for every sparse layer that has run on a GPU in 16 bits, in the model's order."""
    rows = []
    for name, _, packed in _all_packed(model):
        sides = (None if matrix is None else matrix.choice for matrix in (packed.forward, packed.backward))
        rows.append(LayerBackend(name, packed.format.dtype, *sides))
    return rows

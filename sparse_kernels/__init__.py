"""Double-pruned N:M sparse linear layers with low-rank adapters, for any PyTorch model and any training loop.

    from sparse_kernels import sparsify, update_masks
    report = sparsify(model)            # nn.Linear and Conv1D layers become SparseLinear, in place
    for batch in batches:               # train as usual: torch.optim.AdamW(model.parameters()), clip_grad_norm_, ...
        ...
        optimizer.step()
        update_masks(model)             # W^{R,C} follows the new weights

The three products of a layer (SLoPe, arXiv 2405.16325, equations 4.4-4.6), B tokens:

    forward      Y[B,out] = X[B,in] · W^R[out,in]^T + bias        W^R: N:M along in, its mask is fixed
    input grad   dX[B,in] = dY[B,out] · W^{R,C}[out,in]           W^{R,C}: W^R pruned again, N:M along out
    weight grad  dV[out,in·N/M] = gather(dY[B,out]^T · X[B,in])   dense product, read at the kept positions
    adapter      Y += scaling · (X · A^T) · B^T                   A[r,in], B[out,r]

The only trainable weight is `values` (out, in·N/M), an ordinary parameter: optimizers, clipping and checkpoints need
nothing special. Under DDP set broadcast_buffers=False: every rank updates its masks alike. Under FSDP2 a rank has some
rows of `values`, and `update_masks` does not work: slope_cli.distributed.sharding has what does.

The baselines SR-STE, FST, S-STE and Wanda train dense weights: `mask_layers` makes MaskedLinear layers,
`update_masks` and `decay_pruned` are called in the training loop, and `sparsify` can continue from there.
"""

from typing import Any

from sparse_kernels import deprecated
from sparse_kernels.adapters import adapted_layers, adapter_rank, adapters_of, add_adapters, check_adapters
from sparse_kernels.convert import find_sparse_layers, input_norms, mask_layers, sparsify, to_dense
from sparse_kernels.fp8 import fp8_layers, fp8_obstacle, fp8_underflow, set_fp8
from sparse_kernels.kernel_choice import kernel_choices, use_choices
from sparse_kernels.layers import (
    backends,
    check_backend,
    dense_gradients,
    dense_weights,
    mask_buffers,
    measure_kernels,
    prepare,
    refresh,
    set_backend,
    share_packed,
    sparse_layers,
    update_backward_masks,
    update_masks,
    update_row_masks,
    using_backend,
)
from sparse_kernels.lora import AdaptedLinear, LowRankAdapter
from sparse_kernels.masked_linear import MaskedLinear, decay_pruned, masked_layers, remove_masks
from sparse_kernels.packed import Backend
from sparse_kernels.selection import MLP, LayerReport, ModelReport, select_layers
from sparse_kernels.sparse_linear import SparseLinear
from sparse_kernels.sparse_relu import SparseSquaredReLU, defer_activations

__all__ = [
    "MLP",
    "AdaptedLinear",
    "Backend",
    "LayerReport",
    "LowRankAdapter",
    "MaskedLinear",
    "ModelReport",
    "SparseLinear",
    "SparseSquaredReLU",
    "adapted_layers",
    "adapter_rank",
    "adapters_of",
    "add_adapters",
    "backends",
    "check_adapters",
    "check_backend",
    "decay_pruned",
    "defer_activations",
    "dense_gradients",
    "dense_weights",
    "find_sparse_layers",
    "fp8_layers",
    "fp8_obstacle",
    "fp8_underflow",
    "input_norms",
    "kernel_choices",
    "mask_buffers",
    "mask_layers",
    "masked_layers",
    "measure_kernels",
    "prepare",
    "refresh",
    "remove_masks",
    "select_layers",
    "set_backend",
    "set_fp8",
    "share_packed",
    "sparse_layers",
    "sparsify",
    "to_dense",
    "update_backward_masks",
    "update_masks",
    "update_row_masks",
    "use_choices",
    "using_backend",
]


def __getattr__(name: str) -> Any:
    """Names of version 0.1."""
    if name not in deprecated.FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    deprecated.warn(name, deprecated.FUNCTIONS[name])
    return globals()[deprecated.FUNCTIONS[name]]

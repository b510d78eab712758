"""Double-pruned N:M sparse linear layers with low-rank adapters, for any PyTorch model and any training loop.

    from sparse_kernels import sparsify
    report = sparsify(model)            # nn.Linear and Conv1D layers become SparseLinear, in place
    ... train as usual: torch.optim.AdamW(model.parameters()), clip_grad_norm_, DDP, state_dict ...

The three products of a layer (SLoPe, arXiv 2405.16325, equations 4.4-4.6), B tokens:

    forward      Y[B,out] = X[B,in] · W^R[out,in]^T + bias        W^R: N:M along in, fixed positions
    input grad   dX[B,in] = dY[B,out] · W^{R,C}[out,in]           W^{R,C}: W^R pruned again, N:M along out
    weight grad  dV[out,in·N/M] = gather(dY[B,out]^T · X[B,in])   dense product, read at the kept positions
    adapter      Y += scale · (X · A^T) · B^T                     A[r,in], B[out,r]

The only trainable weight is `values` (out, in·N/M), an ordinary dense parameter: optimizers, clipping, DDP,
FSDP and checkpoints need nothing special.

What it is compared with, SR-STE, FST and Wanda, trains dense weights under a mask: `mask_layers` makes MaskedLinear
layers, `renew_masks` and `decay_pruned` belong into the loop, and `sparsify` can go on from there.
"""

from sparse_kernels.adapters import adapted_layers, adapters_of, extend_adapters
from sparse_kernels.convert import (
    MLP,
    LayerReport,
    Report,
    add_adapters,
    densify,
    input_norms,
    mask_layers,
    plan,
    sparsify,
)
from sparse_kernels.layers import backends, prepare, refresh, renew_column_masks, renew_masks, sparse_layers
from sparse_kernels.lora import AdaptedLinear, LowRankAdapter
from sparse_kernels.masked_linear import MaskedLinear, decay_pruned, finish_dense, masked_layers
from sparse_kernels.packed import set_backend
from sparse_kernels.sparse_linear import SparseLinear

__all__ = [
    "MLP",
    "AdaptedLinear",
    "LayerReport",
    "LowRankAdapter",
    "MaskedLinear",
    "Report",
    "SparseLinear",
    "adapted_layers",
    "adapters_of",
    "add_adapters",
    "backends",
    "decay_pruned",
    "densify",
    "extend_adapters",
    "finish_dense",
    "input_norms",
    "mask_layers",
    "masked_layers",
    "plan",
    "prepare",
    "refresh",
    "renew_column_masks",
    "renew_masks",
    "set_backend",
    "sparse_layers",
    "sparsify",
]

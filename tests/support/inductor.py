"""Warnings that torch's compiler gives of itself."""

import pytest

QUIET = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:The CUDA Graph is empty",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:torch.distributed is disabled",
    "ignore:TensorFloat32 tensor cores",
)

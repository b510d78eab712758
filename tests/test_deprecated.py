"""Names of version 0.1 still work, with a warning that says the present one."""

import pytest
import torch
from torch import nn

import sparse_kernels
from sparse_kernels import SparseLinear, add_adapters, mask_layers, select_layers, sparsify, update_masks
from sparse_kernels.deprecated import FUNCTIONS, TENSORS


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))


@pytest.mark.parametrize(("old", "new"), FUNCTIONS.items())
def test_functions(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"^sparse_kernels: {old} is now {new}$"):
        assert getattr(sparse_kernels, old) is getattr(sparse_kernels, new)


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'renew'"):
        _ = sparse_kernels.renew


@pytest.mark.parametrize("function", [select_layers, sparsify, mask_layers])
def test_arguments(function: object) -> None:
    old, new = model(), model()
    with pytest.warns(FutureWarning, match="skip is now exclude_modules"):
        ours = function(old, skip=["1"])  # type: ignore[operator]
    assert ours == function(new, exclude_modules=["1"])  # type: ignore[operator]
    assert [type(layer) for layer in old] == [type(layer) for layer in new]


def test_the_argument_of_mask_updates() -> None:
    network = model()
    sparsify(network)
    before = [layer.backward_mask() for _, layer in sparse_kernels.sparse_layers(network)]
    with pytest.warns(FutureWarning, match="columns is now backward"):
        update_masks(network, columns="random")  # type: ignore[call-arg]
    after = [layer.backward_mask() for _, layer in sparse_kernels.sparse_layers(network)]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_attributes_and_tensors_of_saved_models() -> None:
    network = model()
    sparsify(network, backward_rescale=True)
    add_adapters(network, 4)
    layer = network[1]
    assert isinstance(layer, SparseLinear)
    assert layer.adapter is not None
    with pytest.warns(FutureWarning, match="positions is now row_mask_bits"):
        assert layer.positions is layer.row_mask_bits
    with pytest.warns(FutureWarning, match="A is now lora_A"):
        assert layer.adapter.A is layer.adapter.lora_A
    with pytest.warns(FutureWarning, match="scale is now scaling"):
        layer.adapter.scale = 3.0
    assert layer.adapter.scaling == 3.0
    with pytest.warns(FutureWarning, match="renew_column_mask is now update_backward_mask"):
        layer.renew_column_mask()
    names = {new: old for old, new in TENSORS.items()}
    state = network.state_dict()
    old = {
        ".".join([*key.split(".")[:-1], names.get(key.split(".")[-1], key.split(".")[-1])]): state[key] for key in state
    }
    assert old.keys() != state.keys()
    other = model()
    sparsify(other, backward_rescale=True, mask="random")
    add_adapters(other, 4)
    other.load_state_dict(old)
    assert all(torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())

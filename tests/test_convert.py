"""sparsify, mask_layers, add_adapters and to_dense on the four families of models, and on a user's own."""

import copy
import itertools
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparse_kernels import (
    MLP,
    MaskedLinear,
    SparseLinear,
    add_adapters,
    input_norms,
    mask_layers,
    masked_layers,
    masks,
    remove_masks,
    select_layers,
    sparse_layers,
    sparsify,
    to_dense,
    update_backward_masks,
    update_masks,
)


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=48, n_positions=16)
        )
    if family == "opt":
        return transformers.OPTForCausalLM(
            transformers.OPTConfig(**common, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=32)
        )
    if family == "bert":
        return transformers.BertForPreTraining(
            transformers.BertConfig(**common, intermediate_size=64, max_position_embeddings=16)
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**common, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=16)
    )


def run(model: nn.Module) -> Tensor:
    output = model.eval()(torch.arange(24).view(2, 12))
    return output.logits if hasattr(output, "logits") else output.prediction_logits


DENSE = {
    "gpt2": {"transformer.h.0.attn.c_attn", "lm_head"},
    "opt": {f"model.decoder.layers.0.self_attn.{p}_proj" for p in "kvq"} | {"lm_head"},
    "bert": {f"bert.encoder.layer.0.attention.self.{p}" for p in ("query", "key", "value")}
    | {"cls.predictions.decoder", "cls.seq_relationship"},
    "llama": {f"model.layers.0.self_attn.{p}_proj" for p in "kvq"} | {"lm_head"},
}


@pytest.mark.parametrize("family", DENSE)
def test_families(family: str) -> None:
    model = tiny(family)
    dense = copy.deepcopy(model)
    report = sparsify(model)
    assert {layer.name for layer in report.skipped} == DENSE[family]
    assert all(layer.reason for layer in report.skipped)
    assert {layer.name for layer in report.swapped} == {name for name, _ in sparse_layers(model)}
    assert len(report.layers) == sum(type(m) is nn.Linear or type(m).__name__ == "Conv1D" for m in dense.modules())
    # The same masks on the dense model give the same logits: Conv1D's transposed weight included.
    for name, layer in sparse_layers(model):
        linear = dense.get_submodule(name)
        mask = layer.row_mask().t() if layer.conv1d else layer.row_mask()
        linear.weight.data *= mask  # type: ignore[operator]
    torch.testing.assert_close(run(model), run(dense))
    run(model).sum().backward()
    without = [n for n, p in model.named_parameters() if n.endswith("values") and p.grad is None]
    assert without == (["bert.pooler.dense.values"] if family == "bert" else [])  # it feeds the other head
    back = copy.deepcopy(model)
    to_dense(back)
    assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()]
    assert back.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(run(back), run(dense))


def test_adapters_start_as_nothing_and_merge_exactly() -> None:
    model = tiny("gpt2")
    sparsify(model)
    before = run(model)
    adapters = add_adapters(model, 0.1, alpha=6.0, seed=1)
    assert set(adapters) == {name for name, _ in sparse_layers(model)}
    assert all(a.rank == 3 and a.scaling == 2.0 for a in adapters.values())  # 10 % of 32
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B)
    with_adapters = run(model)
    assert not torch.allclose(with_adapters, before)
    merged, dropped = copy.deepcopy(model), copy.deepcopy(model)
    to_dense(merged, adapters="merge")
    torch.testing.assert_close(run(merged), with_adapters, atol=1e-5, rtol=1e-4)
    to_dense(dropped, adapters="drop")
    torch.testing.assert_close(run(dropped), before)
    with pytest.raises(ValueError, match="say adapters='merge'"):
        to_dense(model)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapters(model, 4)


def test_an_update_changes_only_the_backward_mask() -> None:
    model = tiny("opt")
    sparsify(model)
    layer = next(layer for _, layer in sparse_layers(model))
    rows, backward = layer.row_mask_bits.clone(), layer.backward_mask_bits.clone()
    with torch.no_grad():
        layer.values.normal_()
    update_backward_masks(model)
    assert torch.equal(layer.row_mask_bits, rows)
    assert not torch.equal(layer.backward_mask_bits, backward)
    layer.validate()


def test_masks_differ_between_layers_and_repeat_with_the_seed() -> None:
    a, b, c = tiny("gpt2"), tiny("gpt2"), tiny("gpt2")
    sparsify(a, mask="random", seed=1)
    sparsify(b, mask="random", seed=1)
    sparsify(c, mask="random", seed=2)
    bits = [{name: layer.row_mask_bits for name, layer in sparse_layers(m)} for m in (a, b, c)]
    assert all(torch.equal(bits[0][k], bits[1][k]) for k in bits[0])
    assert not any(torch.equal(bits[0][k], bits[2][k]) for k in bits[0])
    blocks = [v for k, v in bits[0].items() if k.endswith("c_fc")]
    assert not torch.equal(blocks[0], blocks[1])


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(32, 64)
        self.mid = nn.Linear(64, 64)
        self.odd = nn.Linear(64, 24)
        self.tied = nn.Linear(64, 64)
        self.twin = nn.Linear(64, 64)
        self.twin.weight = self.tied.weight


def test_own_model_reports_every_reason() -> None:
    model = Mine()
    report = sparsify(model, exclude_modules=[])
    assert {x.name: x.reason for x in report.layers} == {
        "inp": "first layer after the input",
        "mid": "",
        "odd": "sides are not multiples of 16",
        "tied": "weight is shared with another layer",
        "twin": "weight is shared with another layer",
    }
    assert isinstance(model.mid, SparseLinear)
    assert "inp (64 x 32): first layer after the input" in str(report)


def test_patterns_with_large_groups_ask_for_their_multiple() -> None:
    model = nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 64), nn.Linear(64, 64))
    report = select_layers(model, n=16, m=32)
    assert [x.name for x in report.swapped] == ["3"]


def test_selecting_layers_changes_nothing_and_needs_no_memory() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    report = select_layers(model)
    assert len(report.swapped) == 2 * 7 - 3
    assert not list(sparse_layers(model))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no linear layer of Sequential can be made sparse"):
        sparsify(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="exclude_modules: 'mpl' matches no linear layer"):
        sparsify(tiny("gpt2"), exclude_modules=["mpl"])
    with pytest.raises(ValueError, match="0 < n < m"):
        sparsify(tiny("gpt2"), n=4, m=4)
    with pytest.raises(ValueError, match="no sparse layer"):
        add_adapters(tiny("gpt2"), 4)
    model = tiny("gpt2")
    sparsify(model)
    with pytest.raises(ValueError, match="positive whole number or a share"):
        add_adapters(model, 2.5)
    with pytest.raises(ValueError, match="adapters must be"):
        to_dense(model, adapters="keep")


# ---------------------------------------------------------------------------------------------------------------------
# Patterns of blocks, and which layers


def test_pattern_overrides_give_blocks_their_own_patterns() -> None:
    model = tiny("bert")
    report = sparsify(model, pattern_overrides=[(1, 1, 2, 8)])
    patterns = {name: (layer.n, layer.m) for name, layer in sparse_layers(model)}
    assert {(x.n, x.m) for x in report.swapped if ".layer.1." in x.name} == {(2, 8)}
    assert all(patterns[name] == (2, 8) if ".layer.1." in name else patterns[name] == (2, 4) for name in patterns)
    assert patterns["bert.encoder.layer.1.attention.output.dense"] == (2, 8)
    assert patterns["bert.pooler.dense"] == (2, 4)  # in no block
    assert {x.name: (x.n, x.m) for x in report.swapped} == patterns
    for _, layer in sparse_layers(model):
        layer.validate()
    run(model).sum().backward()
    assert str(report).startswith(f"{len(patterns)} of {len(report.layers)} linear layers are sparse (5 2:4, 6 2:8)")


def test_pattern_overrides_of_a_bare_module_list() -> None:
    model = nn.ModuleList([nn.Linear(32, 32) for _ in range(12)])
    report = select_layers(model, pattern_overrides=[(2, 3, 1, 2), (10, 11, 4, 8)])
    assert [(x.n, x.m) for x in report.layers] == [(2, 4)] * 2 + [(1, 2)] * 2 + [(2, 4)] * 6 + [(4, 8)] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([(0, 2, 2, 8)], "blocks 0-2: GPT2LMHeadModel has blocks 0 to 1"),
        ([(1, 0, 2, 8)], "blocks 1-0"),
        ([(-1, 0, 2, 8)], "blocks -1-0"),
        ([(0, 1, 2, 8), (1, 1, 1, 4)], "blocks 1-1: block 1 has a pattern already"),
        ([(0, 0, 8, 8)], "0 < n < m, got 8:8"),
    ],
)
def test_bad_pattern_overrides_are_refused(overrides: list[tuple[int, int, int, int]], message: str) -> None:
    model = tiny("gpt2")
    for change in (select_layers, sparsify, mask_layers):
        with pytest.raises(ValueError, match=message):
            change(model, pattern_overrides=overrides)
    assert not list(sparse_layers(model))


MLPS = {
    "gpt2": {f"transformer.h.{i}.mlp.{x}" for i in range(2) for x in ("c_fc", "c_proj")},
    "opt": {f"model.decoder.layers.{i}.fc{x}" for i in range(2) for x in (1, 2)},
    "bert": {f"bert.encoder.layer.{i}.{x}.dense" for i in range(2) for x in ("intermediate", "output")},
    "llama": {f"model.layers.{i}.mlp.{x}_proj" for i in range(2) for x in ("gate", "up", "down")},
}


@pytest.mark.parametrize("family", MLPS)
def test_the_mlps_alone_may_be_targeted(family: str) -> None:
    model = tiny(family)
    report = mask_layers(model, target_modules=[MLP], transposable=True)
    assert {x.name for x in report.swapped} == MLPS[family] == {name for name, _ in masked_layers(model)}
    assert any(x.reason == "not in an MLP" for x in report.skipped)
    run(model).sum().backward()
    with pytest.raises(ValueError, match="target_modules: 'mpl' matches no linear layer"):
        select_layers(tiny(family), target_modules=["mpl"])


# ---------------------------------------------------------------------------------------------------------------------
# Masked layers


@pytest.mark.parametrize("family", DENSE)
def test_masked_families(family: str) -> None:
    model, sparse = tiny(family), tiny(family)
    dense = copy.deepcopy(model)
    report = mask_layers(model)
    assert report == sparsify(sparse)  # the same layers, for the same reasons
    assert {x.name for x in report.swapped} == {name for name, _ in masked_layers(model)}
    torch.testing.assert_close(run(model), run(sparse))
    for name, layer in masked_layers(model):
        linear = dense.get_submodule(name)
        assert x_of(report, name).transposed == layer.conv1d == (family == "gpt2")
        mask = layer.mask.t() if layer.conv1d else layer.mask
        linear.weight.data *= mask  # type: ignore[operator]
    back = copy.deepcopy(model)
    to_dense(back)
    assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()]
    torch.testing.assert_close(run(back), run(dense))
    for name, value in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def x_of(report, name: str):  # type: ignore[no-untyped-def]
    return next(x for x in report.layers if x.name == name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_masked_model_without_its_masks_is_the_dense_model_again(family: str) -> None:
    model = tiny(family)
    dense = copy.deepcopy(model)
    mask_layers(model, mvue=True, transposable=True)
    assert not torch.allclose(run(model), run(dense))
    remove_masks(model)
    update_masks(model)
    torch.testing.assert_close(run(model), run(dense))
    to_dense(model)
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_masked_run_continues_sparse_with_its_masks_and_its_optimizer(family: str) -> None:
    model = tiny(family)
    mask_layers(model, n=1, m=4, pattern_overrides=[(1, 1, 2, 4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        run(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_masks(model)
    before, masked = run(model), dict(masked_layers(model))
    report = sparsify(model, n=1, m=4, pattern_overrides=[(1, 1, 2, 4)], mask="present")
    torch.testing.assert_close(run(model), before)
    assert not list(masked_layers(model))
    for row in report.swapped:
        layer, old = model.get_submodule(row.name), masked[row.name]
        assert isinstance(layer, SparseLinear)
        assert torch.equal(layer.row_mask(), old.mask)
        assert layer.conv1d == old.conv1d == (family == "gpt2")
        assert not row.transposed  # masked weights are (out, in), whatever they were
        if (state := optimizer.state.get(old.weight)) is not None:
            moments = layer.kept(state["exp_avg"], transposed=row.transposed)
            assert moments.shape == layer.values.shape
            assert torch.equal(moments, state["exp_avg"][old.mask].view_as(moments))


def test_the_state_of_a_conv1d_follows() -> None:
    model = tiny("gpt2")
    old = {name: module.weight for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    report = sparsify(model)
    for row in report.swapped:
        layer = model.get_submodule(row.name)
        assert row.transposed
        assert torch.equal(layer.kept(old[row.name].detach(), transposed=row.transposed), layer.values)  # type: ignore[operator]


def test_new_masks_for_masked_layers() -> None:
    model = tiny("llama")
    mask_layers(model, mask="random")
    weights = {name: layer.weight.detach().clone() for name, layer in masked_layers(model)}
    with pytest.raises(ValueError, match=r"mask kind 'present' keeps .* is not 2:8"):
        sparsify(model, n=2, m=8, mask="present")
    assert len(list(masked_layers(model))) == len(weights)  # nothing was swapped
    sparsify(model)
    for name, layer in sparse_layers(model):
        assert torch.equal(layer.row_mask(), masks.row_mask(weights[name], 2, 4))
    unmasked = tiny("llama")
    mask_layers(unmasked)
    remove_masks(unmasked)
    with pytest.raises(ValueError, match=r"mask kind 'present' keeps existing masks, .* is not 2:4"):
        sparsify(unmasked, mask="present")
    sparsify(unmasked)
    with pytest.raises(ValueError, match="has none"):
        sparsify(tiny("llama"), mask="present")


def test_masks_of_masked_layers_are_those_of_sparse_ones() -> None:
    a, b = tiny("gpt2"), tiny("gpt2")
    mask_layers(a, mask="random", seed=3)
    sparsify(b, mask="random", seed=3)
    sparse = dict(sparse_layers(b))
    assert all(torch.equal(layer.mask, sparse[name].row_mask()) for name, layer in masked_layers(a))


def test_mask_layers_refuses_before_it_changes_anything() -> None:
    model = tiny("gpt2")
    for options, message in [
        ({"m": 8, "transposable": True}, "up to m=4, got m=8"),
        ({"mask": "present"}, "for sparsify alone"),
        ({"mask": "largest"}, "mask kind must be"),
        ({"mask": "wanda"}, "needs the norms of the 32 inputs of"),
    ]:
        with pytest.raises(ValueError, match=message):
            mask_layers(model, **options)
    assert not list(masked_layers(model))
    with pytest.raises(ValueError, match="mask kind must be"):
        sparsify(model, mask="largest")


# ---------------------------------------------------------------------------------------------------------------------
# Wanda, rescaling, random backward masks


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_wanda_takes_the_norms_of_its_inputs(family: str) -> None:
    model = tiny(family)
    names = [x.name for x in select_layers(model).swapped]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: inputs[name].append(x[0]))
        for name in names
    ]
    batches = [torch.arange(24).view(2, 12), torch.arange(10, 20).view(1, 10)]
    for ids in batches:
        model.eval()(ids)
    for handle in handles:
        handle.remove()

    norms = input_norms(model, names, lambda: [model(ids) for ids in batches])
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name in names:
        expected = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]]).norm(dim=0)
        assert len(torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]])) == 34
        torch.testing.assert_close(norms[name], expected.detach())
    dense = copy.deepcopy(model)
    masked = copy.deepcopy(model)
    sparsify(model, mask="wanda", norms=norms)
    mask_layers(masked, mask="wanda", norms=norms)
    differ = 0
    for name, layer in sparse_layers(model):
        weight = dense.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
        weight = weight.t() if layer.conv1d else weight
        score = weight.abs() * norms[name]
        assert torch.equal(layer.row_mask(), masks.nm_mask(score, 2, 4))
        assert torch.equal(dict(masked_layers(masked))[name].mask, layer.row_mask())
        differ += int((layer.row_mask() != masks.row_mask(weight, 2, 4)).sum())
    assert differ > 0
    del norms[names[-1]]
    with pytest.raises(ValueError, match=f"inputs of {names[-1]}"):
        sparsify(dense, mask="wanda", norms=norms)
    assert not list(sparse_layers(dense))


def test_input_norms_of_compiled_blocks_and_of_what_never_runs() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    X = torch.randn(5, 8)
    model[1].compile(backend="eager")
    with torch.no_grad():
        model(X)  # compiled before there are hooks
    norms = input_norms(model, ["1.1"], lambda: model(X))
    torch.testing.assert_close(norms["1.1"], model[1][0](model[0](X)).norm(dim=0).detach())
    with pytest.raises(ValueError, match="no token reached 0"):
        input_norms(model, ["0"], lambda: None)
    with pytest.raises(ValueError, match="has no layer 'two'"):
        input_norms(model, ["two"], lambda: model(X))


@pytest.mark.parametrize("convert", [partial(sparsify, rescale=True), partial(sparsify, mask="random", rescale=True)])
def test_rescale_keeps_the_energy_of_each_layer(convert: partial) -> None:  # type: ignore[type-arg]
    model, plain = tiny("gpt2"), tiny("gpt2")
    dense = {
        name: module.weight.detach() for name, module in model.named_modules() if type(module).__name__ == "Conv1D"
    }
    convert(model)
    sparsify(plain, mask=convert.keywords.get("mask", "magnitude"))
    for (name, layer), (_, as_is) in zip(sparse_layers(model), sparse_layers(plain), strict=True):
        torch.testing.assert_close(layer.values.square().sum(), dense[name].square().sum())
        ratio = layer.values / as_is.values
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
        assert torch.equal(layer.backward_mask_bits, as_is.backward_mask_bits)


def test_rescale_of_zeros_leaves_zeros() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    nn.init.zeros_(model[1].weight)
    sparsify(model, rescale=True)
    assert not model[1].values.any()


def test_backward_options_of_a_model() -> None:
    model, plain = tiny("opt"), tiny("opt")
    sparsify(model, backward_rescale=True)
    sparsify(plain)
    extra = {name for name in model.state_dict() if name not in plain.state_dict()}
    assert extra == {f"{name}.backward_scale" for name, _ in sparse_layers(model)}
    drawn = []
    for seed in (1, 1, 2):
        update_masks(model, backward="random", seed=seed)
        for _, layer in sparse_layers(model):
            layer.validate()
            factor = (layer.weight.norm() / layer.weight_backward.norm()).detach()
            torch.testing.assert_close(layer.backward_scale, factor)
        drawn.append([layer.backward_mask_bits.clone() for _, layer in sparse_layers(model)])
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not any(map(torch.equal, drawn[0], drawn[2]))
    update_backward_masks(model)
    update_backward_masks(plain)
    pairs = zip(sparse_layers(model), sparse_layers(plain), strict=True)
    assert all(torch.equal(a.backward_mask_bits, b.backward_mask_bits) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("draw", ["row masks", "masks", "backward masks", "adapters"])
def test_every_layer_draws_its_own_random_numbers(draw: str) -> None:
    """One seed for all would prune layers of one shape alike, and start their adapters alike."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    for linear in model:  # as alike as can be: what differs was drawn
        linear.load_state_dict(model[0].state_dict())
    if draw == "masks":
        mask_layers(model, mask="random", seed=1)
        drawn = [layer.mask for _, layer in masked_layers(model)]
    else:
        sparsify(model, mask="random" if draw == "row masks" else "magnitude", seed=1)
        update_backward_masks(model, kind="random", seed=1)
        adapters = add_adapters(model, 4, seed=1)
        layers = dict(sparse_layers(model))
        drawn = {
            "row masks": [layer.row_mask() for layer in layers.values()],
            "backward masks": [layer.backward_mask() for layer in layers.values()],
            "adapters": [adapter.lora_A for adapter in adapters.values()],
        }[draw]
    assert len(drawn) == 4
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_gaussian_adapters_of_a_model() -> None:
    model = tiny("opt")
    sparsify(model)
    before = run(model)
    adapters = add_adapters(model, 4, init="gaussian")
    assert all(adapter.scaling == 0.25 for adapter in adapters.values())
    assert torch.equal(run(model), before)


def test_masked_layers_stay_where_sparsify_leaves_them() -> None:
    model = tiny("gpt2")
    mask_layers(model)
    sparsify(model, exclude_modules=["c_fc"])
    assert all(name.endswith("c_fc") for name, _ in masked_layers(model))
    assert isinstance(model.get_submodule("transformer.h.0.mlp.c_fc"), MaskedLinear)

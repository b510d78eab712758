"""sparsify, add_adapters and densify on the four families of models, and on somebody's own."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparse_kernels import SparseLinear, add_adapters, densify, plan, renew_column_masks, sparse_layers, sparsify


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
    densify(back)
    assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()]
    assert back.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(run(back), run(dense))


def test_adapters_start_as_nothing_and_merge_exactly() -> None:
    model = tiny("gpt2")
    sparsify(model)
    before = run(model)
    adapters = add_adapters(model, 0.1, alpha=6.0, seed=1)
    assert set(adapters) == {name for name, _ in sparse_layers(model)}
    assert all(a.rank == 3 and a.scale == 2.0 for a in adapters.values())  # 10 % of 32
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)
    for adapter in adapters.values():
        nn.init.normal_(adapter.B)
    with_adapters = run(model)
    assert not torch.allclose(with_adapters, before)
    merged, dropped = copy.deepcopy(model), copy.deepcopy(model)
    densify(merged, adapters="merge")
    torch.testing.assert_close(run(merged), with_adapters, atol=1e-5, rtol=1e-4)
    densify(dropped, adapters="drop")
    torch.testing.assert_close(run(dropped), before)
    with pytest.raises(ValueError, match="say adapters='merge'"):
        densify(model)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapters(model, 4)


def test_renewal_changes_only_the_column_choice() -> None:
    model = tiny("opt")
    sparsify(model)
    layer = next(layer for _, layer in sparse_layers(model))
    rows, columns = layer.positions.clone(), layer.positions_t.clone()
    with torch.no_grad():
        layer.values.normal_()
    renew_column_masks(model)
    assert torch.equal(layer.positions, rows)
    assert not torch.equal(layer.positions_t, columns)
    layer.validate()


def test_masks_differ_between_layers_and_repeat_with_the_seed() -> None:
    a, b, c = tiny("gpt2"), tiny("gpt2"), tiny("gpt2")
    sparsify(a, mask="random", seed=1)
    sparsify(b, mask="random", seed=1)
    sparsify(c, mask="random", seed=2)
    bits = [{name: layer.positions for name, layer in sparse_layers(m)} for m in (a, b, c)]
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
    report = sparsify(model, skip=[])
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
    report = plan(model, n=16, m=32)
    assert [x.name for x in report.swapped] == ["3"]


def test_plan_changes_nothing_and_needs_no_memory() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    report = plan(model)
    assert len(report.swapped) == 2 * 7 - 3
    assert not list(sparse_layers(model))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no linear layer of Sequential can be made sparse"):
        sparsify(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="skip pattern 'mpl' matches no linear layer"):
        sparsify(tiny("gpt2"), skip=["mpl"])
    with pytest.raises(ValueError, match="0 < n < m"):
        sparsify(tiny("gpt2"), n=4, m=4)
    with pytest.raises(ValueError, match="no sparse layer"):
        add_adapters(tiny("gpt2"), 4)
    model = tiny("gpt2")
    sparsify(model)
    with pytest.raises(ValueError, match="positive whole number or a share"):
        add_adapters(model, 2.5)
    with pytest.raises(ValueError, match="adapters must be"):
        densify(model, adapters="keep")

"""A step's seed, and how the micro-batches of a step add up."""

import copy

import pytest
import torch
from support.inductor import QUIET
from support.marks import slow
from torch import Tensor

from slope_cli.methods.optim import moments_of
from slope_cli.models.build import build_model, model_config
from slope_cli.models.loss import forward, loss_fn, training_loss
from slope_cli.train.step import MaskUpdate, Step, StepOutput, compile_blocks, step_seed
from sparse_kernels import sparse_layers, sparsify
from sparse_kernels.masks import double_prune, drop_and_grow, scatter

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 48}


def test_the_seed_of_the_first_rank_is_that_of_one_process() -> None:
    expected = {
        (1, 0): 3717377837946358015,
        (1, 1): 38901565946305238,
        (3, 11): 5623506163822623250,
        (2**63 - 1, 10**6): 2694970432226926820,
    }
    for (seed, step), value in expected.items():
        assert step_seed(seed, step) == step_seed(seed, step, 0) == value


def test_ranks_steps_and_seeds_draw_apart() -> None:
    seeds = [step_seed(seed, step, rank) for seed in (0, 1, 2) for step in range(20) for rank in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def bert() -> torch.nn.Module:
    return build_model(model_config("bert-base", overrides={**SIZES, "intermediate_size": 64}, dropout=0.0), seed=1)


def gpt2() -> torch.nn.Module:
    return build_model(model_config("gpt2-nano", overrides=GPT2, dropout=0.0), seed=1)


def masked_batch(*shares: float) -> dict[str, Tensor]:
    """A sequence for each share, which is that of its tokens that are predicted."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 48, (len(shares), 24), generator=generator)
    chosen = torch.rand(tokens.shape, generator=generator) < torch.tensor(shares)[:, None]
    return {
        "input_ids": tokens,
        "labels": torch.where(chosen, tokens, -100),
        "token_type_ids": (torch.arange(24) > 12).long().expand_as(tokens),
        "next_sentence_label": torch.arange(len(shares)) % 2,
    }


def text(count: int) -> dict[str, Tensor]:
    """Sequences of 24 tokens, which are all predicted."""
    tokens = torch.randint(0, 48, (count, 25), generator=torch.Generator().manual_seed(3))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def rows(batch: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: tensor[first:last] for name, tensor in batch.items()}


def updated(model: torch.nn.Module, *batches: dict[str, Tensor]) -> tuple[StepOutput, list[Tensor]]:
    """What a step of a copy of the model returns, and its weights after it: plain SGD, so they show the gradient."""
    model = copy.deepcopy(model)
    output = Step(model, torch.optim.SGD(model.parameters(), lr=1.0), dtype=None, clip=0.0)(batches)
    return output, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("shares", [(0.6, 0.5, 0.1, 0.05), (0.0, 0.0, 0.3, 0.1), (0.0, 0.0, 0.0, 0.0)])
@pytest.mark.parametrize("sentences", [True, False])
def test_micro_batches_of_masked_words_count_by_their_targets(shares: tuple[float, ...], sentences: bool) -> None:
    model, whole = bert(), masked_batch(*shares)
    if not sentences:
        del whole["next_sentence_label"]
    halves = rows(whole, 0, 2), rows(whole, 2, 4)
    (one, weights), (two, same) = updated(model, whole), updated(model, *halves)
    torch.testing.assert_close(same, weights, rtol=1e-5, atol=1e-6)
    assert two[:3] == pytest.approx(one[:3], rel=1e-5, abs=1e-7)
    if any(shares):  # the mean of the two means would be another
        means = [loss_fn(forward(model, half), half).token_loss.item() for half in halves]
        assert abs(sum(means) / 2 - one.loss) > 1e-3


def test_four_micro_batches_are_one_batch_too() -> None:
    model, whole = bert(), masked_batch(0.9, 0.02, 0.3, 0.1)
    (one, weights), (four, same) = updated(model, whole), updated(model, *(rows(whole, i, i + 1) for i in range(4)))
    torch.testing.assert_close(same, weights, rtol=1e-5, atol=1e-6)
    assert four[:3] == pytest.approx(one[:3], rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_causal_micro_batches_are_divided_by_their_number_bit_for_bit(count: int) -> None:
    model = gpt2()
    tokens = torch.randint(0, 48, (2 * count, 17), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()} for part in tokens.split(2)]
    output, weights = updated(model, *batches)
    losses = torch.zeros(())
    for batch in batches:
        loss = training_loss(model, batch).token_loss
        (loss / count).backward()
        losses = losses + loss.detach() / count
    for p, after in zip(model.parameters(), weights, strict=True):
        assert p.grad is not None
        assert torch.equal(p.detach() - p.grad, after)
    assert output.loss == output.total == losses.item()


def test_a_single_batch_of_masked_words_is_its_own_mean_bit_for_bit() -> None:
    model, batch = bert(), masked_batch(0.5, 0.1)
    output, weights = updated(model, batch)
    loss = loss_fn(forward(model, batch), batch)
    assert loss.sentence_loss is not None
    total = loss.token_loss + loss.sentence_loss
    total.backward()
    for p, after in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p.detach() - p.grad if p.grad is not None else p.detach(), after)
    assert (output.loss, output.total) == (loss.token_loss.item(), total.item())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor's own
@QUIET
@pytest.mark.parametrize("compiled", [False, slow(True)])
def test_dense_gradients_are_those_of_the_step_at_pruned_entries_too(compiled: bool) -> None:
    """At kept entries they are the gradient of the values, and in all the product of the layer's own two factors."""
    model = gpt2()
    sparsify(model)
    layers, (name, last) = dict(sparse_layers(model)), list(sparse_layers(model))[-1]
    batch = text(4)
    halves = [rows(batch, 0, 2), rows(batch, 2, 4)]
    step = Step(model, torch.optim.AdamW(model.parameters()), dtype=None, clip=0, compiled=compiled)
    factors: list[tuple[Tensor, Tensor]] = []

    def watch(layer: torch.nn.Module, given: tuple[Tensor, ...], dY: tuple[Tensor, ...]) -> None:
        factors.append((X[0], dY[0]))

    found = step.dense_gradients(halves)
    assert set(found) == set(layers)
    assert all(p.grad is None for p in model.parameters())
    X: list[Tensor] = []
    handles = [last.register_forward_pre_hook(lambda _, given: X.insert(0, given[0].detach()))]
    handles.append(last.register_full_backward_hook(watch))
    for half in halves:
        step.backward(half, 2, None)
    for handle in handles:
        handle.remove()
    for each, layer in layers.items():
        torch.testing.assert_close(layer.kept(found[each]), layer.values.grad)
    if not compiled:
        whole = sum(torch.einsum("bto,bti->oi", dY, X_BTI) for X_BTI, dY in factors)
        torch.testing.assert_close(found[name], whole)


def test_a_row_mask_update_moves_values_and_moments_with_their_entries() -> None:
    model = gpt2()
    sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = text(4)
    step = Step(model, optimizer, dtype=None, clip=0)
    for _ in range(2):
        step([batch], MaskUpdate())
    layers = dict(sparse_layers(model))

    def dense() -> dict[str, list[Tensor]]:
        """Of each layer: its mask, and as dense matrices its values and moments."""
        return {
            name: [
                x.row_mask(),
                *(scatter(t.detach(), x.row_mask()) for t in (x.values, *moments_of(optimizer, x.values))),
            ]
            for name, x in layers.items()
        }

    before, gradients = dense(), step.dense_gradients([batch])
    step.update_masks(MaskUpdate(row_share=0.25), gradients)
    after = dense()
    for name, layer in layers.items():
        layer.validate()
        (old, W, *_), (new, *kept) = before[name], after[name]
        assert torch.equal(new, drop_and_grow(W, old, gradients[name], 2, 4, 0.25))
        assert not torch.equal(new, old)
        assert len(kept) == 3
        for now, then in zip(kept, before[name][1:], strict=True):
            assert torch.equal(now, then * new)  # what joined is 0, what stays is the same
        assert torch.equal(layer.backward_mask(), double_prune(kept[0], new, 2, 4))


@QUIET
@pytest.mark.slow
def test_every_block_is_compiled_though_each_has_another_constant() -> None:
    """GPT-2 scales the attention of each layer otherwise; torch compiles 8 variants of a function unless told more."""
    sizes = {"n_layer": 10, "n_embd": 16, "n_head": 1, "n_positions": 8}
    config = model_config("gpt2-small", overrides={**sizes, "scale_attn_by_inverse_layer_idx": True})
    model = build_model(config)
    torch.compiler.reset()
    compile_blocks(model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)

"""Shapes, configs, building, and the two pretraining losses of slope_cli.models."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import GPTNeoXConfig

from slope_cli.errors import UsageError
from slope_cli.models import loss as loss_module
from slope_cli.models.build import build_model, model_config
from slope_cli.models.loss import (
    Loss,
    forward,
    kl_divergence,
    loss_and_gradient_,
    loss_fn,
    token_cross_entropy,
    training_loss,
)
from slope_cli.models.shapes import FAMILIES, SHAPES, objective, shape_of

_TINY_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
_TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
_TINY_GROUPED = {**_TINY, "intermediate_size": 64, "num_key_value_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "gpt2-small": _TINY_GPT2,
    "opt-125m": {**_TINY, "ffn_dim": 64},
    "opt-350m": {**_TINY, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "bert-base": {**_TINY, "intermediate_size": 64},
    "llama3-8b": _TINY_GROUPED,
    "mistral-7b": _TINY_GROUPED,
}
CAUSAL = [name for name in TINY if name != "bert-base"]


def tiny(name: str, *, seed: int = 0, dropout: float | None = 0.0) -> Any:
    return build_model(model_config(name, overrides=TINY[name], dropout=dropout), seed=seed)


def causal_batch(B: int = 3, T: int = 17, V: int = 96) -> dict[str, Tensor]:
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def masked_batch(B: int = 3, T: int = 17, V: int = 96) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, V, (B, T), generator=generator)
    chosen = torch.rand(B, T, generator=generator) < 0.3
    return {
        "input_ids": tokens,
        "labels": torch.where(chosen, tokens, -100),
        "token_type_ids": (torch.arange(T) > T // 2).long().expand(B, T),
        "next_sentence_label": torch.randint(0, 2, (B,), generator=generator),
    }


def batch_for(name: str) -> dict[str, Tensor]:
    return masked_batch() if name == "bert-base" else causal_batch()


def loss_of(model: Any, batch: dict[str, Tensor]) -> Loss:
    return loss_fn(forward(model, batch), batch)


def total(loss: Loss) -> Tensor:
    """What pretraining minimises."""
    return loss.token_loss if loss.sentence_loss is None else loss.token_loss + loss.sentence_loss


# ---- parameter counts, from the shapes alone


def gpt2_count(d: int, layers: int, V: int = 50257, P: int = 1024) -> int:
    block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    return (V + P) * d + layers * block + 2 * d


def opt_count(d: int, layers: int, projected: int | None = None) -> int:
    block = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    # The position table has two rows more than positions; only pre-norm models end with a norm.
    ends = 2 * d if projected is None else 2 * projected * d
    return 50272 * (projected or d) + (2048 + 2) * d + layers * block + ends


def bert_count(d: int, layers: int) -> int:
    block = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    embeddings = (30522 + 512 + 2) * d + 2 * d
    heads = (d * d + d + 2 * d + 30522) + (2 * d + 2)  # transform, norm and output bias; next sentence
    return embeddings + layers * block + (d * d + d) + heads


def grouped_count(V: int, d: int = 4096, layers: int = 32, inner: int = 14336) -> int:
    kv = 1024
    return 2 * V * d + layers * (2 * d * d + 2 * d * kv + 3 * d * inner + 2 * d) + d


COUNTS = {
    "gpt2-nano": gpt2_count(128, 4, V=272, P=256),
    "gpt2-small": gpt2_count(768, 12),
    "gpt2-medium": gpt2_count(1024, 24),
    "gpt2-large": gpt2_count(1280, 36),
    "gpt2-xl": gpt2_count(1600, 48),
    "opt-125m": opt_count(768, 12),
    "opt-350m": opt_count(1024, 24, projected=512),
    "opt-1.3b": opt_count(2048, 24),
    "opt-2.7b": opt_count(2560, 32),
    "opt-6.7b": opt_count(4096, 32),
    "opt-13b": opt_count(5120, 40),
    "opt-30b": opt_count(7168, 48),
    "opt-66b": opt_count(9216, 64),
    "bert-base": bert_count(768, 12),
    "bert-large": bert_count(1024, 24),
    "llama3-8b": grouped_count(128256),
    "llama3-70b": grouped_count(128256, 8192, 80, 28672),
    "mistral-7b": grouped_count(32768),
}
PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "bert-base": 110_106_428,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_counts(name: str) -> None:
    model = build_model(model_config(name), device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert COUNTS[name] == PUBLISHED.get(name, COUNTS[name])
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())


def test_meta_is_instant_for_the_largest() -> None:
    config = model_config("opt-66b")
    start = time.process_time()  # other programs may use the processor
    build_model(config, device="meta")
    assert time.process_time() - start < 5


# ---- configs


@pytest.mark.parametrize("name", SHAPES)
def test_config_answers(name: str) -> None:
    config = model_config(name)
    shape = SHAPES[name]
    assert config.model_type == shape.family
    assert objective(config) == ("masked" if shape.family == "bert" else "causal")
    assert config.vocab_size == shape.config["vocab_size"]
    assert config.hidden_size == shape.config.get("n_embd", shape.config.get("hidden_size"))
    assert config.max_position_embeddings == shape.config.get(
        "n_positions", shape.config.get("max_position_embeddings")
    )
    assert config._attn_implementation == "sdpa"


def test_published_details() -> None:
    llama, mistral, opt350 = (model_config(name) for name in ("llama3-8b", "mistral-7b", "opt-350m"))
    assert llama.rope_parameters["rope_theta"] == 500_000
    assert llama.rms_norm_eps == mistral.rms_norm_eps == 1e-5
    assert mistral.rope_parameters["rope_theta"] == 1_000_000
    assert mistral.sliding_window is None
    assert not opt350.do_layer_norm_before
    nano = model_config("gpt2-nano")
    assert (nano.resid_pdrop, nano.embd_pdrop, nano.attn_pdrop) == (0, 0, 0)
    assert nano.eos_token_id == 256


@settings(deadline=None, max_examples=20)
@given(seq_len=st.integers(1, 5000), name=st.sampled_from(["gpt2-small", "opt-125m", "bert-base", "llama3-8b"]))
def test_learned_positions_grow_and_never_shrink(seq_len: int, name: str) -> None:
    table = model_config(name).max_position_embeddings
    assert model_config(name, seq_len=seq_len).max_position_embeddings == max(seq_len, table)


def test_longer_positions_run() -> None:
    config = model_config("opt-125m", overrides={**_TINY, "ffn_dim": 64, "max_position_embeddings": 40}, seq_len=40)
    assert math.isfinite(loss_of(build_model(config), causal_batch(T=40)).token_loss.item())


@pytest.mark.parametrize("name", TINY)
def test_dropout_sets_every_rate_and_acts(name: str) -> None:
    model = tiny(name, dropout=0.5)
    batch = batch_for(name)
    torch.manual_seed(0)
    first, second = (loss_of(model, batch).token_loss.item() for _ in range(2))
    assert first != second
    model.eval()
    first, second = (loss_of(model, batch).token_loss.item() for _ in range(2))
    assert first == second


def test_dropout_fields_and_precedence() -> None:
    config = model_config("gpt2-small", dropout=0.0, overrides={"embd_pdrop": 0.3})
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.0, 0.3, 0.0)
    assert model_config("gpt2-small").resid_pdrop == 0.1
    config = model_config("opt-125m", dropout=0.2)
    assert (config.dropout, config.attention_dropout) == (0.2, 0.2)


def test_overrides_take_aliases_and_leave_the_shape_alone() -> None:
    assert model_config("gpt2-nano", overrides={"hidden_size": 64}).n_embd == 64
    config = model_config("llama3-8b", overrides={"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
    assert config.rope_parameters["rope_theta"] == 500_000
    assert SHAPES["llama3-8b"].config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500_000.0}
    assert model_config("gpt2-nano").n_embd == 128


def test_special_ids_outside_a_smaller_vocabulary_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    config = model_config("gpt2-small", overrides={"vocab_size": 272, "bos_token_id": 256})
    assert (config.bos_token_id, config.eos_token_id) == (256, None)
    assert not caplog.records


ERRORS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("gpt2_smal", {}, {}, "unknown model 'gpt2_smal'; did you mean gpt2-small"),
    ("zzz", {}, {}, "unknown model 'zzz'; known are bert-base, bert-large"),
    ("gpt2-nano", {"n_ebmd": 64}, {}, "has no setting 'n_ebmd'; did you mean n_embd"),
    ("gpt2-nano", {"dtype": "bfloat16"}, {}, "has no setting 'dtype'"),
    ("gpt2-nano", {"to_dict": 1}, {}, "has no setting 'to_dict'"),
    ("gpt2-nano", {"n_embd": 64, "hidden_size": 64}, {}, "hidden_size is another name of n_embd"),
    ("gpt2-nano", {"n_embd": "64"}, {}, "n_embd must be a whole number of at least 1, not '64'"),
    ("gpt2-nano", {"n_layer": 0}, {}, "n_layer must be a whole number of at least 1, not 0"),
    ("gpt2-nano", {"n_embd": 1 << 40}, {}, "n_embd must be at most 268435456, not 1099511627776"),
    ("gpt2-nano", {}, {"seq_len": 1 << 62}, "n_positions must be at most 268435456, not 4611686018427387904"),
    ("gpt2-nano", {"n_head": True}, {}, "n_head must be a whole number"),
    ("gpt2-nano", {"n_head": None}, {}, "'n_head' expected int, got NoneType"),
    ("gpt2-nano", {"layer_norm_epsilon": "x"}, {}, "'layer_norm_epsilon' expected float, got str"),
    ("gpt2-nano", {"activation_function": "gleu"}, {}, "unknown activation_function 'gleu'; did you mean gelu"),
    ("gpt2-nano", {"n_embd": 130}, {}, "4 attention heads do not divide the width 130"),
    ("opt-125m", {"num_attention_heads": 7}, {}, "7 attention heads do not divide the width 768"),
    ("llama3-8b", {"hidden_size": 4098}, {}, "(4098) is not a multiple of the number of attention heads (32)"),
    ("llama3-8b", {"num_attention_heads": 4}, {}, "num_key_value_heads 8 does not divide num_attention_heads 4"),
    ("mistral-7b", {"head_dim": 15}, {}, "even"),
    ("llama3-8b", {"rope_parameters": {"rope_type": "foo"}}, {}, "unknown rope_type 'foo'; known are default"),
    ("llama3-8b", {"rope_parameters": {"rope_type": "linear"}}, {}, "factor"),
    ("llama3-8b", {}, {"seq_len": 9000}, "seq_len 9000 is longer than max_position_embeddings 8192"),
    ("gpt2-nano", {"n_positions": 128}, {"seq_len": 256}, "seq_len 256 is longer than n_positions 128"),
    ("gpt2-nano", {}, {"seq_len": 0}, "seq_len must be at least 1, not 0"),
    ("gpt2-nano", {}, {"dropout": 1.0}, "resid_pdrop must be a number from 0"),
    ("bert-base", {"hidden_dropout_prob": -0.1}, {}, "hidden_dropout_prob must be a number from 0"),
    ("opt-125m", {"vocab_size": 96, "eos_token_id": 96}, {}, "eos_token_id 96 is outside the vocabulary of 96"),
]


@pytest.mark.parametrize(("name", "overrides", "more", "message"), ERRORS)
def test_error_lines(name: str, overrides: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        model_config(name, overrides=overrides, **more)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_family_predicts_the_next_token_but_is_not_built() -> None:
    assert objective(GPTNeoXConfig()) == "causal"
    with pytest.raises(UsageError, match="model type 'gpt_neox' is not supported"):
        build_model(GPTNeoXConfig(), device="meta")


# ---- building


@pytest.mark.parametrize("name", TINY)
def test_seed_decides_the_weights_and_nothing_else_changes(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = tiny(name, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second, other = tiny(name, seed=1).state_dict(), tiny(name, seed=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", TINY)
def test_any_number_of_threads_draws_the_same_weights(name: str) -> None:
    threads = torch.get_num_threads()
    many = tiny(name).state_dict()
    try:
        torch.set_num_threads(1)
        one = tiny(name).state_dict()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(many[key], one[key]) for key in one)


@pytest.mark.parametrize("name", TINY)
def test_weights_are_drawn_as_transformers_draws_them(name: str) -> None:
    """By the same rules: of each matrix the same standard deviation, and no two alike; the rest equal."""
    overrides = {**TINY[name], "vocab_size": 640, ("n_embd" if "gpt2" in name else "hidden_size"): 128}
    config = model_config(name, overrides=overrides)
    ours = dict(build_model(config).named_parameters())
    theirs = dict(getattr(transformers, FAMILIES[shape_of(name).family].model_class)(config).named_parameters())
    assert ours.keys() == theirs.keys()
    matrices = {key for key, tensor in theirs.items() if tensor.std() > 0 and tensor.dim() == 2}
    for key, tensor in ours.items():
        if key not in matrices:
            torch.testing.assert_close(tensor, theirs[key])
        elif tensor.numel() >= 4096:
            torch.testing.assert_close(tensor.std(), theirs[key].std(), rtol=0.06, atol=0.0)
    assert len({ours[key].flatten()[:8].sum().item() for key in matrices}) == len(matrices)


def test_weights_that_will_be_read_are_not_drawn() -> None:
    model = build_model(model_config("gpt2-small", overrides=TINY["gpt2-small"]), seed=None)
    assert not any(p.any() for p in model.parameters() if p.dim() == 2)
    assert all((p == 1).all() for name, p in model.named_parameters() if "ln_" in name and "weight" in name)


def test_model_is_float32_and_training() -> None:
    model = tiny("gpt2-small")
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["opt-125m", "llama3-8b"])
def test_every_token_learns_from_being_read(name: str) -> None:
    """No row of the embedding is cut off from its gradient as padding."""
    embedding = tiny(name).get_input_embeddings()
    assert embedding.padding_idx is None
    assert bool((embedding.weight.abs().sum(1) > 0).all())


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    saved, again = model.state_dict(), loaded.state_dict()
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    batch = batch_for(name)
    assert torch.equal(total(loss_of(model.eval(), batch)), total(loss_of(loaded.eval(), batch)))


@pytest.mark.parametrize("name", CAUSAL)
def test_generate(name: str) -> None:
    overrides = {**TINY[name], "eos_token_id": None}
    model = build_model(model_config(name, overrides=overrides)).eval()
    prompt = causal_batch(B=2, T=5)["input_ids"]
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 11)
    assert torch.equal(out[:, :5], prompt)
    greedy = prompt
    for _ in range(6):  # the cache changes nothing
        greedy = torch.cat((greedy, model(greedy, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out, greedy)


# ---- losses


@pytest.mark.parametrize("name", TINY)
def test_every_weight_gets_a_finite_gradient(name: str) -> None:
    model = tiny(name)
    loss = loss_of(model, batch_for(name))
    torch.autograd.backward(total(loss))
    assert math.isfinite(total(loss).item())
    assert loss.token_loss.item() == pytest.approx(math.log(96), rel=0.1)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_loss_is_transformers_own(name: str) -> None:
    model = tiny(name).eval()
    tokens = causal_batch()["input_ids"]
    loss = loss_of(model, {"input_ids": tokens, "labels": F.pad(tokens[:, 1:], (0, 1), value=-100)})
    torch.testing.assert_close(loss.token_loss, model(tokens, labels=tokens).loss)
    assert loss.targets.item() == tokens.shape[0] * (tokens.shape[1] - 1)
    assert loss.sentence_loss is None


def test_masked_loss_is_transformers_own() -> None:
    model = tiny("bert-base").eval()
    batch = masked_batch()
    loss = loss_of(model, batch)
    torch.testing.assert_close(total(loss), model(**batch).loss)
    assert loss.targets.item() == (batch["labels"] != -100).sum().item()
    without = {key: value for key, value in batch.items() if key != "next_sentence_label"}
    tokens_only = loss_of(model, without)
    assert tokens_only.sentence_loss is None
    assert torch.equal(tokens_only.token_loss, loss.token_loss)
    assert loss.sentence_loss is not None
    assert loss.sentence_loss > 0


def test_masked_loss_uses_segments_and_padding() -> None:
    model = tiny("bert-base").eval()
    batch = masked_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[:, -3:] = 0
    whole = loss_of(model, batch).token_loss
    assert not torch.equal(whole, loss_of(model, {**batch, "attention_mask": mask}).token_loss)
    one_segment = {**batch, "token_type_ids": torch.zeros_like(mask)}
    assert not torch.equal(whole, loss_of(model, one_segment).token_loss)


NANO = build_model(model_config("gpt2-nano", overrides={"n_embd": 16, "n_layer": 1, "n_head": 2}))


@settings(deadline=None, max_examples=25)
@given(B=st.integers(1, 4), T=st.integers(1, 12), kept=st.floats(0, 1), seed=st.integers(0, 999))
def test_token_loss_is_the_mean_over_the_labelled(B: int, T: int, kept: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 272, (B, T), generator=generator)
    labels = torch.where(torch.rand(B, T, generator=generator) < kept, tokens, -100)
    chosen, batch = labels != -100, {"input_ids": tokens, "labels": labels}
    expected = F.cross_entropy(NANO(tokens).logits[chosen], tokens[chosen]) if chosen.any() else torch.zeros(())
    with torch.no_grad():
        losses = [loss_of(NANO, batch)]
    losses.append(loss_of(NANO, batch))  # with a gradient all of the logits are cast at once
    for loss in losses:
        assert loss.targets.item() == chosen.sum().item()
        torch.testing.assert_close(loss.token_loss.detach(), expected.detach())


def test_loss_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        causal, masked = loss_of(tiny("gpt2-small"), causal_batch()), loss_of(tiny("bert-base"), masked_batch())
    assert total(causal).dtype == total(masked).dtype == torch.float32
    assert causal.targets.dtype == torch.int64


def test_loss_of_a_compiled_model_matches() -> None:
    model = tiny("gpt2-small")
    compiled = torch.compile(model, backend="eager")
    batch = causal_batch()
    torch.testing.assert_close(loss_of(compiled, batch).token_loss, loss_of(model, batch).token_loss)


def test_logits_and_loss_come_apart() -> None:
    """The forward pass reads no labels, and the loss may use another cross-entropy."""
    model, batch = tiny("gpt2-small").eval(), causal_batch()
    output = forward(model, {"input_ids": batch["input_ids"]})
    assert output.sentence_logits is None
    torch.testing.assert_close(output.logits, model(batch["input_ids"]).logits)
    seen = []

    def counting(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(logits_BTV.shape)
        return token_cross_entropy(logits_BTV, labels_BT)

    assert torch.equal(loss_fn(output, batch, counting).token_loss, loss_fn(output, batch).token_loss)
    assert seen == [output.logits.shape]
    bert, masked = tiny("bert-base").eval(), masked_batch()
    found = forward(bert, masked)
    expected = bert(**{key: masked[key] for key in ("input_ids", "token_type_ids")})
    torch.testing.assert_close(found.logits, expected.prediction_logits)
    assert found.sentence_logits is not None
    torch.testing.assert_close(found.sentence_logits, expected.seq_relationship_logits)


@pytest.mark.parametrize("name", TINY)
def test_a_forward_pass_leaves_the_config_of_the_model_as_it_was(name: str) -> None:
    model = tiny(name)
    before = model.config.to_dict(), model.config._attn_implementation
    forward(model, batch_for(name))
    assert (model.config.to_dict(), model.config._attn_implementation) == before


@settings(deadline=None, max_examples=25)
@given(B=st.integers(1, 3), T=st.integers(1, 5), kept=st.floats(0, 1), seed=st.integers(0, 999))
def test_divergence_is_the_mean_over_the_labelled(B: int, T: int, kept: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(B, T, 11, generator=generator) for _ in range(2))
    labels = torch.where(torch.rand(B, T, generator=generator) < kept, 3, -100)
    chosen = labels != -100
    found = kl_divergence(student, teacher, labels)
    log_p, log_q = student[chosen].log_softmax(-1), teacher[chosen].log_softmax(-1)
    expected = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) if chosen.any() else torch.zeros(())
    torch.testing.assert_close(found, expected)
    assert kl_divergence(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------- the loss without all of the logits


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.floats(0, 1),
    st.integers(1, 400),
    st.booleans(),
    st.integers(0, 999),
)
def test_the_training_loss_and_its_gradient_are_those_of_plain_cross_entropy(
    B: int, T: int, kept: float, at_once: int, tied: bool, seed: int
) -> None:
    """In float64, in parts of any size, with any labels left out, for one micro-batch of several."""
    sizes = {"vocab_size": 37, "n_embd": 8, "n_layer": 1, "n_head": 2, "tie_word_embeddings": tied}
    model = build_model(model_config("gpt2-nano", overrides=sizes, dropout=0.0)).double()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(37, (B, T), generator=generator)
    labels = torch.where(torch.rand(B, T, generator=generator) < kept, tokens, -100)
    batch = {"input_ids": tokens, "labels": labels}
    summed = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    expected = summed / (labels != -100).sum().clamp(min=1)
    (expected / 3).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
        patch.setattr(loss_module, "ROWS_AT_ONCE", 2)
        found = training_loss(model, batch)
    (found.token_loss / 3).backward()
    torch.testing.assert_close(found.token_loss.detach(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert found.targets.item() == (labels != -100).sum().item()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", TINY)
def test_the_training_loss_is_that_of_the_logits(name: str) -> None:
    model, batch = tiny(name).eval(), batch_for(name)
    expected = loss_fn(forward(model, batch), batch)
    for found in (training_loss(model, batch), training_loss(model, batch, token_cross_entropy, loss_and_gradient_)):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    head = model.get_output_embeddings()
    assert "forward" not in vars(head)
    with torch.no_grad():
        torch.testing.assert_close(training_loss(model, batch).token_loss, expected.token_loss.detach())


def test_a_training_loss_in_16_bits_is_that_of_plain_cross_entropy() -> None:
    gradients, losses = [], []
    for run in (lambda m, b: loss_fn(forward(m, b), b), training_loss):
        model, batch = tiny("opt-125m"), causal_batch()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(model, batch).token_loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
def test_a_compiled_loss_and_its_gradient_match() -> None:
    labels, share = torch.tensor([3, -100, 0, 36]), torch.tensor(0.25)
    for dtype in (torch.float32, torch.bfloat16):
        eager, compiled = (torch.randn(4, 37, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
        losses = [
            f(x, labels, share) for f, x in ((loss_and_gradient_, eager), (torch.compile(loss_and_gradient_), compiled))
        ]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(compiled, eager)

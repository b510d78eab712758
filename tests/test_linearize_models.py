"""Linearized attention in transformers' models: equal to the original where it must be, to itself in any pieces.

Shape suffixes: B sequences, T positions, V vocabulary.
"""

import copy
from typing import Any

import pytest
import torch
from support.models import (
    CAUSAL,
    FORMS,
    SHAPES,
    left_padded,
    linearized,
    of_every_name,
    positions_of,
    randomize,
    tiny_model,
    tokens,
)
from torch import Tensor

from slope_cli.config.methods import LinearizeConfig
from slope_cli.errors import UsageError
from slope_cli.linearize.cache import LinearWindowCache
from slope_cli.linearize.swap import (
    NAME,
    added_state,
    linear_windows,
    linearize_attention,
    load_added_state,
    restore_attention,
    using,
)
from slope_cli.models.loss import forward, loss_fn
from sparse_kernels import sparsify

TOLERANCE = 2e-4
EVERY_CAUSAL = pytest.mark.parametrize("name", CAUSAL)


def logits(model: Any, ids_BT: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=ids_BT, **more)
    found: Tensor = output.logits if "logits" in output else output.prediction_logits
    return found


def close(actual: Tensor, expected: Tensor, atol: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SHAPES)
def test_a_window_over_everything_is_the_original_model(name: str) -> None:
    model, ids_BT = tiny_model(name), tokens(60)
    original, far = logits(model, ids_BT), 0.0
    forms: list[dict[str, Any]] = [{"window": 60}]
    if name != "bert-base":
        forms += [{"window": 30, "kind": "terrace"}, {"window": 60, "state": "delta"}]
    for form in forms:
        linearize_attention(model, LinearizeConfig(**form))
        randomize(model)
        close(logits(model, ids_BT), original, 1e-4)
        restore_attention(model)
    linearize_attention(model, LinearizeConfig(window=8))
    far = float((logits(model, ids_BT) - original).abs().max())
    assert far > 0.1  # the test would see a difference


@pytest.mark.parametrize("name", SHAPES)
def test_padding_is_not_seen_and_a_window_over_everything_is_the_original(name: str) -> None:
    ids_BT, mask_BT = left_padded(tokens(40, rows=3), [0, 13, 6])
    # BERT has its positions from the place in the row; the others need them with left padding.
    more = {"attention_mask": mask_BT} | ({} if name == "bert-base" else {"position_ids": positions_of(mask_BT)})
    model = tiny_model(name)
    original = logits(model, ids_BT, **more)
    linearize_attention(model, LinearizeConfig(window=40))
    close(logits(model, ids_BT, **more)[mask_BT > 0], original[mask_BT > 0], 1e-4)
    restore_attention(model)
    linearize_attention(model, LinearizeConfig(window=5))
    randomize(model)
    other_BT = ids_BT.where(mask_BT > 0, 11)
    close(logits(model, other_BT, **more)[mask_BT > 0], logits(model, ids_BT, **more)[mask_BT > 0], 1e-6)


@pytest.mark.parametrize(("name", "form"), of_every_name(*FORMS.values()))
def test_any_split_of_the_prompt_gives_the_same_logits(name: str, form: dict[str, Any]) -> None:
    model, ids_BT = linearized(name, **form), tokens(100)
    expected = logits(model, ids_BT, use_cache=False)
    for split in ([100], [1] * 100, [13, 17, 1, 69], [30, *[1] * 70]):
        close(_in_pieces(model, ids_BT, split), expected)


@pytest.mark.parametrize(("name", "form"), of_every_name(*FORMS.values()))
def test_left_padded_pieces_equal_the_unpadded_sequence(name: str, form: dict[str, Any]) -> None:
    model, padding = linearized(name, **form), [0, 13, 6]
    ids_BT, mask_BT = left_padded(tokens(40, rows=3), padding)
    for split in ([40], [17, 1, 2, 20], [9, *[1] * 31]):
        padded = _in_pieces(model, ids_BT, split, mask_BT)
        for row, begin in enumerate(padding):
            alone = logits(model, ids_BT[row : row + 1, begin:], use_cache=False)
            close(padded[row : row + 1, begin:], alone)


@pytest.mark.parametrize(("name", "form"), of_every_name(*FORMS.values()))
def test_later_tokens_and_the_length_change_nothing(name: str, form: dict[str, Any]) -> None:
    model, ids_BT = linearized(name, **form), tokens(140)
    whole = logits(model, ids_BT)
    for length in (1, 7, 33, 64, 65, 139):
        close(logits(model, ids_BT[:, :length]), whole[:, :length], 1e-5)


@pytest.mark.parametrize(("name", "form"), of_every_name(*FORMS.values()))
def test_generation_with_a_cache_padding_and_beams(name: str, form: dict[str, Any]) -> None:
    model, padding = linearized(name, **form), [0, 9]
    ids_BT, mask_BT = left_padded(tokens(20), padding)
    settings = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 3):
        batch_BT = model.generate(ids_BT, attention_mask=mask_BT, num_beams=beams, **settings)
        slow_BT = model.generate(ids_BT, attention_mask=mask_BT, num_beams=beams, use_cache=False, **settings)
        assert torch.equal(batch_BT, slow_BT)
        for row, begin in enumerate(padding):
            prompt = ids_BT[row : row + 1, begin:]
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), num_beams=beams, **settings)
            assert torch.equal(alone[0, -14:], batch_BT[row, -14:])


@EVERY_CAUSAL
def test_layers_may_stay_softmax(name: str) -> None:
    model, ids_BT = tiny_model(name), tokens(60)
    original = logits(model, ids_BT)
    assert len(linearize_attention(model, LinearizeConfig(window=60, keep_softmax=[1]))) == 1
    close(logits(model, ids_BT), original, 1e-4)
    restore_attention(model)
    linearize_attention(model, LinearizeConfig(window=5, keep_softmax=[0]))
    randomize(model)
    expected = logits(model, ids_BT, use_cache=False)
    assert (expected - original).abs().max() > 0.01
    close(_in_pieces(model, ids_BT, [20, 1, 17, *[1] * 22]), expected)
    padded_BT, mask_BT = left_padded(ids_BT, [0, 13])
    padded = _in_pieces(model, padded_BT, [30, *[1] * 10, 20], mask_BT)
    close(padded[1:, 13:], logits(model, ids_BT[1:, 13:]))


def test_the_cache_is_of_one_size_and_knows_the_length() -> None:
    model, ids_BT = linearized("llama3-8b", window=5), tokens(60)
    with torch.no_grad():
        cache = model(input_ids=ids_BT[:, :30], use_cache=True).past_key_values
        assert cache.get_seq_length() == 30
        size = sum(layer.nbytes() for layer in cache.layers)
        for t in range(30, 60):
            model(input_ids=ids_BT[:, t : t + 1], past_key_values=cache, use_cache=True)
    assert all(type(layer) is LinearWindowCache for layer in cache.layers)
    assert cache.get_seq_length() == 60
    assert sum(layer.nbytes() for layer in cache.layers) == size
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        again = model(input_ids=ids_BT[:, :30], past_key_values=cache, use_cache=True).logits
    close(again, logits(model, ids_BT[:, :30]))


@pytest.mark.slow
def test_decoding_4096_tokens_in_bfloat16_stays_with_the_one_pass() -> None:
    model = tiny_model("llama3-8b", max_position_embeddings=4160, num_hidden_layers=1)
    linearize_attention(model, LinearizeConfig(window=16))
    randomize(model)
    model.bfloat16()
    ids_BT = tokens(4160, rows=1)
    whole, pieces = logits(model, ids_BT, use_cache=False), _in_pieces(model, ids_BT, [64, *[1] * 4096])
    for part in (slice(64, 576), slice(-512, None)):
        wrong = (pieces - whole)[:, part].float().norm() / whole[:, part].float().norm()
        assert wrong < 5e-3


def test_the_state_is_per_kv_head() -> None:
    linear = next(iter(linear_windows(linearized("llama3-8b")).values()))
    assert linear.map_q.weight.shape[0] == linear.mix.shape[0] == 4
    assert linear.map_k.weight.shape[0] == 2


def test_a_sliding_window_of_the_model_itself_holds_in_the_layers_that_stay() -> None:
    config = {**SHAPES["mistral-7b"], "sliding_window": 9}
    model, ids_BT = tiny_model("mistral-7b", **config), tokens(50)
    original = logits(model, ids_BT)
    linearize_attention(model, LinearizeConfig(window=5))
    with using(model, mode="softmax"):
        close(logits(model, ids_BT), original, 1e-5)
        close(_in_pieces(model, ids_BT, [20, 3, *[1] * 27]), original)


def test_the_teacher_is_the_original_model_in_pieces_too() -> None:
    for name in SHAPES:
        model, ids_BT = tiny_model(name), tokens(40)
        original = logits(model, ids_BT)
        linearize_attention(model, LinearizeConfig(window=5))
        with using(model, mode="softmax"):
            assert torch.equal(logits(model, ids_BT), original)
            if name in CAUSAL:
                close(_in_pieces(model, ids_BT, [13, 20, *[1] * 7]), original)
        assert (logits(model, ids_BT) - original).abs().max() > 0.01


def test_a_cache_filled_in_another_mode_is_refused() -> None:
    model, ids_BT = linearized("gpt2-nano"), tokens(9)
    with torch.no_grad():
        cache = model(input_ids=ids_BT, use_cache=True).past_key_values
        with using(model, mode="softmax"), pytest.raises(ValueError, match="filled its cache"):
            model(input_ids=ids_BT, past_key_values=cache)
        with using(model, mode="softmax"):
            cache = model(input_ids=ids_BT, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="filled its cache"):
            model(input_ids=ids_BT, past_key_values=cache)


@pytest.mark.parametrize("name", SHAPES)
def test_restoring_leaves_nothing_behind(name: str) -> None:
    model, ids_BT = tiny_model(name), tokens(20)
    original, keys = logits(model, ids_BT), list(model.state_dict())
    implementation = model.config._attn_implementation
    swapped = linearize_attention(model, LinearizeConfig(window=4))
    assert model.config._attn_implementation == NAME
    assert swapped == list(linear_windows(model))
    assert restore_attention(model) == swapped
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model, ids_BT), original)


def test_copies_and_other_attention_implementations_stay_linearized() -> None:
    model, ids_BT = linearized("gpt2-nano", window=4), tokens(30)
    expected = logits(model, ids_BT)
    other = copy.deepcopy(model)
    restore_attention(model)
    assert torch.equal(logits(other, ids_BT), expected)
    close(_in_pieces(other, ids_BT, [10, *[1] * 20]), expected)
    other.config._attn_implementation = "sdpa"
    assert torch.equal(logits(other, ids_BT), expected)
    padded_BT, mask_BT = left_padded(ids_BT, [0, 4])
    with pytest.raises(ValueError, match="mask of padding"):
        logits(other, padded_BT, attention_mask=mask_BT)


@pytest.mark.parametrize("name", ["gpt2-nano", "llama3-8b", "bert-base"])
def test_the_pretraining_loss_is_that_of_the_linearized_model(name: str) -> None:
    """`forward` switches the attention implementation to one without masks."""
    model, ids_BT = tiny_model(name), tokens(30)
    batch = {"input_ids": ids_BT, "labels": ids_BT}
    original = loss_fn(forward(model, batch), batch).token_loss
    linearize_attention(model, LinearizeConfig(window=4))
    found = logits(model, ids_BT)
    expected = torch.nn.functional.cross_entropy(found.flatten(0, 1), ids_BT.flatten())
    assert abs(expected - original) > 1e-3
    loss = loss_fn(forward(model, batch), batch)
    close(loss.token_loss, expected, 1e-5)
    torch.autograd.backward(loss.token_loss)
    assert all(p.grad is not None for linear in linear_windows(model).values() for p in linear.parameters())


@pytest.mark.parametrize("branch", ["window", "linear"])
def test_branches_of_a_model(branch: Any) -> None:
    model, ids_BT = linearized("llama3-8b", window=5), tokens(60)
    both = logits(model, ids_BT)
    with using(model, branch=branch):
        alone = logits(model, ids_BT)
        close(_in_pieces(model, ids_BT, [20, *[1] * 40]), alone)
    close(alone[:, :5], both[:, :5])  # nothing is far yet
    assert (alone - both)[:, 20:].abs().max() > 0.01
    assert torch.equal(logits(model, ids_BT), both)


def test_a_sparse_model_keeps_its_layers() -> None:
    model, ids_BT = tiny_model("gpt2-nano"), tokens(30)
    sparsify(model, n=2, m=4)
    original = logits(model, ids_BT)
    linearize_attention(model, LinearizeConfig(window=30))
    close(logits(model, ids_BT), original, 1e-4)


def test_a_compiled_model_is_the_same() -> None:
    model, ids_BT = linearized("llama3-8b", window=5), tokens(40)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(logits(compiled, ids_BT, use_cache=False), logits(model, ids_BT), 1e-5)


def test_what_was_added_is_saved_and_loaded() -> None:
    model, other = linearized("llama3-8b", window=5), tiny_model("llama3-8b")
    state = added_state(model)
    assert set(state) == set(model.state_dict()) - set(other.state_dict())
    linearize_attention(other, LinearizeConfig(window=5))
    load_added_state(other, state)
    ids_BT = tokens(20)
    assert torch.equal(logits(other, ids_BT), logits(model, ids_BT))


def test_what_was_saved_of_another_model_is_refused() -> None:
    model = linearized("llama3-8b", window=5)
    for name, settings, said in [
        ("llama3-8b", {"features": 3}, "saved with shape"),
        ("llama3-8b", {"feature_map": "t2r"}, "is only in the saved maps"),
        ("llama3-8b", {"keep_softmax": [0]}, "is only in the model"),
        ("llama3-8b", {"state": "gated"}, "is only in the saved maps"),
        ("llama3-8b", {"state": "delta"}, "is only in the saved maps"),
        ("gpt2-nano", {}, "is only in"),
    ]:
        state = added_state(linearized(name, **settings))
        before = {key: tensor.clone() for key, tensor in added_state(model).items()}
        with pytest.raises(UsageError, match=said) as error:
            load_added_state(model, state)
        assert "\n" not in str(error.value)
        assert all(torch.equal(tensor, before[key]) for key, tensor in added_state(model).items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 0}, "window=0: must be positive"),
        ({"features": 0}, "features=0: must be positive"),
        ({"feature_map": "hegdehog"}, "choose one of hedgehog, t2r"),
        ({"feature_map": "softmax"}, "feature_map=softmax: choose one of hedgehog, t2r"),
        ({"mix": 1.0}, "mix=1.0: must be above 0 and below 1"),
        ({"window_dropout": 1.5}, "window_dropout=1.5: is a probability, which must lie between 0 and 1"),
        ({"keep_softmax": [2]}, "there is no layer 2; the model's are 0 to 1"),
        ({"keep_softmax": [0, 1]}, "none would be linearized"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    model = tiny_model("gpt2-nano")
    keys = list(model.state_dict())
    with pytest.raises(UsageError, match=said) as error:
        linearize_attention(model, LinearizeConfig(**settings))
    assert "\n" not in str(error.value)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("form", [{"window": 9}, {"window": 4, "kind": "terrace"}])
def test_a_model_s_own_window_is_never_smaller_than_the_new_one(form: dict[str, Any]) -> None:
    """Within the new window the model is its own teacher, or it is refused."""
    model, ids_BT = tiny_model("mistral-7b", sliding_window=9), tokens(9)
    original = logits(model, ids_BT)
    for window in (form["window"] + 1, 60):
        with pytest.raises(
            UsageError, match=f"^linearize.window={window}: the model's own sliding_window is 9; [^\n]*at most"
        ):
            linearize_attention(model, LinearizeConfig(**{**form, "window": window}))
    assert not linear_windows(model)
    linearize_attention(model, LinearizeConfig(**form))
    randomize(model)
    seen = 9 if form["window"] == 9 else 8
    close(logits(model, ids_BT)[:, :seen], original[:, :seen], 1e-4)


def test_models_that_cannot_be_linearized() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = linearized("gpt2-nano")
    with pytest.raises(UsageError, match="linearized already"):
        linearize_attention(model, LinearizeConfig())
    with pytest.raises(UsageError, match="two-sided"):
        linearize_attention(tiny_model("bert-base"), LinearizeConfig(kind="terrace"))
    for state in ("gated", "delta"):
        with pytest.raises(UsageError, match=f"linearize.state={state}: has no meaning in a two-sided model"):
            linearize_attention(tiny_model("bert-base"), LinearizeConfig(state=state))
    config = GPTNeoXConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UsageError, match="'gpt_neox' is not supported"):
        linearize_attention(GPTNeoXForCausalLM(config), LinearizeConfig())
    with pytest.raises(UsageError, match="branch must be one of"), using(model, branch="far"):  # type: ignore[arg-type]
        pass


def _in_pieces(model: Any, ids_BT: Tensor, split: list[int], mask_BT: Tensor | None = None) -> Tensor:
    """The logits of a sequence that is fed in pieces, each with the cache that the ones before have left."""
    cache, parts, start = None, [], 0
    for size in split:
        part, more = slice(start, start + size), {}
        if mask_BT is not None:
            more = {"attention_mask": mask_BT[:, : start + size], "position_ids": positions_of(mask_BT)[:, part]}
        with torch.no_grad():
            output = model(input_ids=ids_BT[:, part], past_key_values=cache, use_cache=True, **more)
        cache = output.past_key_values
        parts.append(output.logits)
        start += size
    return torch.cat(parts, dim=1)

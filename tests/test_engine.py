"""The generation engine: transformers' own text token by token, in any company, from any number of slots.

Shape suffixes: T positions.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.marks import slow
from support.models import CAUSAL, FORMS, VOCABULARY, linearized, of_every_name, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slope_cli.errors import UsageError
from slope_cli.inference import slots
from slope_cli.inference.engine import Engine
from slope_cli.inference.products import DenseLinear
from slope_cli.inference.sampling import Sampling, mode_of
from slope_cli.inference.slots import PREFILL
from sparse_kernels import adapters_of, add_adapters, mask_layers, sparse_layers, sparsify
from sparse_kernels.packed_linear import PackedLinear

GREEDY = Sampling(tokens=12, temperature=0)
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def expected(model: Any, prompt: list[int], tokens: int = GREEDY.tokens) -> list[int]:
    """transformers' own greedy continuation of one prompt."""
    ids_1T = torch.tensor([prompt])
    how = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        out_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **how)
    ids: list[int] = out_1T[0, len(prompt) :].tolist()
    return ids


def linear_names(model: nn.Module) -> list[str]:
    """All linear layers but the head."""
    kinds = ("Linear", "Conv1D", "SparseLinear", "MaskedLinear")
    named = ((name, type(module).__name__) for name, module in model.named_modules())
    return [name for name, kind in named if kind in kinds and name != "lm_head"]


def adapted(model: Any) -> Any:
    """The model with adapters that change its text, of other ranks in the MLP than in attention, and none on values."""
    names = [name for name in linear_names(model) if not name.endswith("v_proj")]
    mlp = [name for name in names if "mlp" in name or "fc" in name]
    add_adapters(model, 5, mlp)
    add_adapters(model, 3, [name for name in names if name not in mlp])
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters_of(model).values():
        adapter.lora_B.data.normal_(generator=generator).mul_(0.3)
    return model


def sparse(model: Any) -> Any:
    """The model with 2:4 layers."""
    sparsify(model)
    assert len(list(sparse_layers(model))) >= 7
    return model


def packed(model: Any) -> Any:
    """The 2:4 model as an export in packed form has it: PackedLinear inside of transformers' modules."""
    for name, layer in list(sparse_layers(model)):
        model.set_submodule(name, PackedLinear.fuse([layer], torch.float32))
    return model


def check(model: Any, *engines: dict[str, Any]) -> list[Engine]:
    """Each of the engines, given by its arguments, continues ten prompts of one batch as transformers does."""
    texts, made = [expected(model, prompt) for prompt in prompts()], []
    for how in engines or ({},):
        engine = Engine(model, **{"max_batch": len(LENGTHS), **how})
        found = engine.generate(prompts(), GREEDY)
        assert [text.ids for text in found] == texts
        assert {text.finish_reason for text in found} == {"length"}
        made.append(engine)
    return made


def products(engine: Engine) -> set[type]:
    """The kinds of the engine's products."""
    return {type(module) for module in engine.decoder.modules() if isinstance(module, DenseLinear | PackedLinear)}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_dense_model_continues_as_in_transformers(name: str) -> None:
    check(tiny_model(name))
    check(adapted(tiny_model(name)))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_sparse_model_with_adapters_continues_as_in_transformers(name: str) -> None:
    model = adapted(sparse(tiny_model(name)))
    fast, slow = check(model, {"sparse": True}, {})
    assert products(fast) == {DenseLinear, PackedLinear}  # the first layer is dense
    assert products(slow) == {DenseLinear}
    again = Engine(packed(model), sparse=True)
    assert products(again) == products(fast)
    for own, other in zip(again.decoder.buffers(), fast.decoder.buffers(), strict=True):
        assert torch.equal(own, other)


def test_patterns_without_packed_form_and_masked_layers_are_dense() -> None:
    wide = tiny_model("gpt2-nano")
    sparsify(wide, n=2, m=8)
    masked = tiny_model("llama3-8b")
    mask_layers(masked)
    for model in (wide, masked):
        assert products(*check(model, {"sparse": True})) == {DenseLinear}


@pytest.mark.parametrize("name", ["gpt2-nano", "opt-125m"])
def test_an_activation_that_is_sparse(name: str) -> None:
    check(sparse(tiny_model(name, activation_function="sparse_relu2")), {"sparse": True}, {})


def test_a_sliding_window_that_is_shorter_than_the_text() -> None:
    check(tiny_model("mistral-7b", sliding_window=7))


def test_norms_after_the_sums_and_embeddings_of_another_width() -> None:
    check(tiny_model("opt-125m", word_embed_proj_dim=16, do_layer_norm_before=False))


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_scaled_rotary_positions(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    check(tiny_model("llama3-8b", rope_parameters=rope))


@pytest.mark.parametrize(
    ("name", "form"),
    of_every_name(
        {"window": 5},
        {"window": 4, "kind": "terrace"},
        {"window": 4, "cache": 6},
        {"window": 5, "state": "gated"},
        {"window": 5, "state": "delta"},
        {"window": 1},
        {"window": 8, "keep_softmax": [1]},
        {"window": 4, "cache": 6, "keep_softmax": ["1/0"]},
        {"window": 5, "state": "delta", "keep_softmax": ["0/1", "1/1"]},
        {"window": 4, "kind": "terrace", "state": "gated"},
    ),
)
def test_a_linearized_model_continues_as_in_transformers(name: str, form: dict[str, Any]) -> None:
    check(linearized(name, **form), {"max_batch": 3})


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_more_texts_than_slots_are_the_same_texts(count: int) -> None:
    model = tiny_model("llama3-8b")
    one = Engine(model, max_batch=1)
    alone = [one.generate([prompt], GREEDY)[0].ids for prompt in prompts()]
    assert [text.ids for text in Engine(model, max_batch=count).generate(prompts(), GREEDY)] == alone


@pytest.mark.parametrize("name", ["gpt2-nano", "mistral-7b"])
def test_prompts_are_read_together_up_to_a_number_of_tokens(name: str) -> None:
    engine = Engine(tiny_model(name), max_batch=10)
    found = []
    # 7 x 21, 2 x 55 and 89; 5 x 8, 2 x 21, 34, 55 and 89
    for tokens, read in ((engine._most_together, [7, 2, 1]), (60, [5, 2, 1, 1, 1]), (PREFILL, [10])):
        engine._most_together = tokens
        found.append([text.ids for text in engine.generate(prompts(), GREEDY)])
        for prompt in prompts():
            engine.submit(prompt)
        assert [len(engine._admitted()) for _ in range(len(read) + 1)] == [*read, 0]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("name", "most", "tokens", "graphs"),
    [
        *((name, *rest) for name in CAUSAL for rest in ((64, 4096, 5), (2, 4096, 2), (64, 64, 2))),
        *((form, 64, 4096, 5) for form in ("gated", "cache", "heads")),
        *(slow(form, 64, 4096, 5) for form in FORMS if form not in ("gated", "cache", "heads")),
    ],
)
def test_prompts_that_come_again_are_read_as_by_themselves(
    name: str, most: int, tokens: int, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded, and from the second time on by what a graph does: the same work on the same tensors."""
    monkeypatch.setattr(slots, "captured", lambda work, _: [work(), work(), SimpleNamespace(replay=work)][-1])
    monkeypatch.setattr(slots, "MOST_PREFILLS", most)
    monkeypatch.setattr(slots, "PREFILL", tokens)
    more = {"sliding_window": 7} if name == "mistral-7b" else {}
    model = linearized("llama3-8b", **FORMS[name]) if name in FORMS else tiny_model(name, **more)
    lengths = (*(20, 31, 7, 32) * 2, *(33, 64, 40) * 2, *(70, 90) * 4, 1, 2, *(200, 250) * 3, 99)
    alone = Engine(model, max_batch=1)
    own = [Sampling(tokens=2 + n % 5, temperature=0) for n in range(len(lengths))]
    expected = [alone.generate([prompt], how)[0].ids for prompt, how in zip(prompts(lengths), own, strict=True)]
    engine = Engine(model, max_batch=3)
    engine._slots._padded, engine._slots._logits = True, torch.empty(3, VOCABULARY)
    engine._most_together = PREFILL  # as on a GPU
    texts = [engine.submit(prompt, how) for prompt, how in zip(prompts(lengths), own, strict=True)]
    for _ in engine.stream():
        pass
    assert [text.ids for text in texts] == expected
    assert len(engine._slots._prefills) == graphs


@pytest.mark.parametrize("model", ["llama3-8b", "linear"])
def test_texts_of_different_ends_and_settings_do_not_disturb_one_another(model: str) -> None:
    net = linearized("llama3-8b", window=5) if model == "linear" else tiny_model(model)
    settings = [
        Sampling(tokens=3 + 3 * i, temperature=(0, 1.5)[i % 2], top_k=(0, 7, 90)[i % 3], top_p=(1, 0.9)[i // 5], seed=i)
        for i in range(len(LENGTHS))
    ]
    pairs = list(zip(prompts(), settings, strict=True))
    alone = [Engine(net, max_batch=1).generate([prompt], sampling)[0].ids for prompt, sampling in pairs]
    engine = Engine(net, max_batch=4)
    together = [engine.submit(prompt, sampling) for prompt, sampling in pairs[:6]]
    for _ in range(5):
        engine.step()
    together += [engine.submit(prompt, sampling) for prompt, sampling in pairs[6:]]
    steps = sum(1 for _ in engine.stream())
    assert [text.ids for text in together] == alone
    assert 0 < steps < sum(map(len, alone))
    assert not engine.busy


def test_the_seed_decides() -> None:
    engine = Engine(tiny_model("gpt2-nano"), max_batch=4)
    prompt = prompts()[5]
    texts = [engine.generate([prompt], Sampling(seed=seed, temperature=2))[0].ids for seed in (1, 1, 2, 2**40 + 1)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 3


def test_a_text_may_be_cancelled() -> None:
    engine = Engine(tiny_model("gpt2-nano"), max_batch=2)
    first, second, third = (engine.submit(prompt, GREEDY) for prompt in prompts()[4:7])
    engine.step()
    engine.cancel(first)
    engine.cancel(third)
    assert (first.finish_reason, third.finish_reason, third.ids) == ("cancelled", "cancelled", [])
    for _ in engine.stream():
        pass
    assert second.ids == engine.generate([prompts()[5]], GREEDY)[0].ids
    assert len(first.ids) < GREEDY.tokens


def test_it_stops_where_the_positions_or_the_room_end() -> None:
    model = tiny_model("gpt2-nano", n_positions=64)
    assert [len(text.ids) for text in Engine(model).generate(prompts((4, 60, 63)), Sampling(tokens=99))] == [60, 4, 1]
    assert len(Engine(model, max_length=20).generate(prompts((12,)), Sampling(tokens=99))[0].ids) == 8
    message = "prompt: has 64 tokens and the model only 64 positions; shorten it"
    with pytest.raises(UsageError, match=message):
        Engine(model).submit([5] * 64)
    with pytest.raises(UsageError, match="prompt: has 20 tokens and the engine only 20 positions; shorten it"):
        Engine(model, max_length=20).submit([5] * 20)
    engine = Engine(model)
    with pytest.raises(UsageError, match=message):
        engine.generate([[5], [5] * 64])
    assert not engine.busy


def test_what_cannot_be_continued() -> None:
    with pytest.raises(UsageError, match="predicts masked tokens and cannot continue text"):
        Engine(tiny_model("bert-base"))
    engine = Engine(tiny_model("gpt2-nano"))
    for prompt, sampling in (("text", Sampling()), ([1], Sampling(stop=("x",)))):
        with pytest.raises(UsageError, match="without a tokenizer"):
            engine.submit(prompt, sampling)
    with pytest.raises(UsageError, match="prompt: is empty; give some text to continue"):
        engine.submit([])


def test_the_model_is_read_not_changed() -> None:
    """A sparse model that is trained on: its text follows its weights at the next reading only."""
    model = adapted(sparse(tiny_model("llama3-8b")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine, prompt = Engine(model, sparse=True), prompts()[5]
    text = engine.generate([prompt], GREEDY)[0].ids
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(layer.dense_weight is None for _, layer in sparse_layers(model))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        for _, layer in sparse_layers(model):
            layer.values.neg_()
    assert Engine(model, sparse=True).generate([prompt], GREEDY)[0].ids == expected(model, prompt) != text


class _HostReads(TorchDispatchMode):
    """Refuses what no CUDA graph can hold: shapes or control flow that depend on data, and data from the host."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero")

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation._schema.name.removeprefix("aten::")
        assert not name.startswith(self.forbidden), name
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        assert not any(index is not None and index.dtype == torch.bool for index in indices), name
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["gpt2-nano", "window", *map(slow, ("opt-125m", "llama3-8b", "terrace", "sparse"))])
def test_a_step_is_fit_for_a_cuda_graph(kind: str) -> None:
    """Nothing of it reaches the host, and all that it leaves is in the same places."""
    forms = {"window": {"window": 5}, "terrace": {"window": 4, "kind": "terrace"}}
    model = linearized("llama3-8b", **forms[kind]) if kind in forms else None
    model = model or (adapted(sparse(tiny_model("llama3-8b"))) if kind == "sparse" else tiny_model(kind))
    engine = Engine(model, max_batch=4, sparse=True)
    for settings in (GREEDY, Sampling(), Sampling(top_k=5), Sampling(top_p=0.9)):
        for prompt in prompts()[3:6]:
            engine.submit(prompt, settings)
        engine.step()
        slots, mode = engine._slots, mode_of([settings], VOCABULARY)
        left = [slots.ids, slots.lengths, *(tensor for cache in slots.caches for tensor in cache.changing())]
        places = [tensor.data_ptr() for tensor in left]
        with _HostReads():
            slots._run(4, mode)
        left = [slots.ids, slots.lengths, *(tensor for cache in slots.caches for tensor in cache.changing())]
        assert [tensor.data_ptr() for tensor in left] == places
        for _ in engine.stream():
            pass


def test_bf16_is_the_precision_of_weights_products_and_cache() -> None:
    engine = Engine(tiny_model("llama3-8b"), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in engine.decoder.buffers()} == {torch.bfloat16}
    assert engine._slots.caches[0].keys.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert len(engine.generate([prompts()[3]], GREEDY)[0].ids) == GREEDY.tokens

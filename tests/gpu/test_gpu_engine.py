"""The generation engine on a GPU: its CUDA graphs give the texts that a CPU computes step by step."""

from typing import Any

import pytest
import torch
from support import inductor
from support.models import CAUSAL, FORMS, VOCABULARY, linearized, tiny_model
from torch import Tensor

from slope_cli.inference import slots
from slope_cli.inference.cache import AttentionCache, HeadsCache, LinearCache, Prompts
from slope_cli.inference.decoder import Decoder
from slope_cli.inference.engine import Engine
from slope_cli.inference.sampling import Sampling
from sparse_kernels import adapters_of, add_adapters, sparse_layers, sparsify
from sparse_kernels.driver import captured

pytestmark = inductor.QUIET

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)


def texts(model: Any, device: str, settings: list[Sampling], **how: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    engine = Engine(model, device=device, dtype=torch.float32, max_batch=4, **how)
    found = [engine.submit(prompt, sampling) for prompt, sampling in zip(prompts, settings, strict=True)]
    for _ in engine.stream():
        pass
    assert bool(engine._slots._graphs) == (device == "cuda")
    return [text.ids for text in found]


GREEDY = [Sampling(tokens=12 + i, temperature=0) for i in range(len(LENGTHS))]
MIXED = [
    Sampling(tokens=12 + i, temperature=(0, 1.5, 0.8)[i % 3], top_k=(0, 7, 90)[i % 3], top_p=(1, 0.9)[i % 2], seed=i)
    for i in range(len(LENGTHS))
]


@pytest.mark.parametrize("settings", [GREEDY, MIXED], ids=["greedy", "mixed"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_softmax_model(name: str, settings: list[Sampling]) -> None:
    model = tiny_model(name)
    assert texts(model, "cuda", settings) == texts(model, "cpu", settings)


def test_a_sliding_window() -> None:
    model = tiny_model("mistral-7b", sliding_window=7)
    assert texts(model, "cuda", GREEDY) == texts(model, "cpu", GREEDY)


@pytest.mark.parametrize(
    "form",
    [
        {"window": 5},
        {"window": 4, "kind": "terrace"},
        {"window": 4, "cache": 6},
        {"window": 5, "state": "delta"},
        {"window": 8, "keep_softmax": [1]},
        {"window": 5, "keep_softmax": ["0/1", "1/0"]},
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_linearized_model(form: dict[str, Any], compiled: bool) -> None:
    model = linearized("llama3-8b", **form)
    assert texts(model, "cuda", GREEDY, compiled=compiled) == texts(model, "cpu", GREEDY)


def test_a_sparse_model_with_adapters() -> None:
    model = tiny_model("llama3-8b")
    sparsify(model)
    add_adapters(model, 3, [name for name, _ in sparse_layers(model)])
    for adapter in adapters_of(model).values():
        adapter.lora_B.data.normal_(generator=torch.Generator().manual_seed(5)).mul_(0.3)
    assert texts(model, "cuda", GREEDY) == texts(model, "cpu", GREEDY)


def test_bf16_is_the_default_and_texts_repeat() -> None:
    engine = Engine(tiny_model("llama3-8b"), device="cuda", max_batch=4)
    assert engine.decoder.tokens.dtype == torch.bfloat16
    sampling = Sampling(tokens=40, top_k=30, seed=3)
    first, second = (engine.generate([[5, 6, 7]] * 4, sampling) for _ in range(2))
    assert len({tuple(text.ids) for text in (*first, *second)}) == 1


@pytest.mark.parametrize("name", ["gpt2-nano", "mistral-7b", *FORMS])
def test_prompts_that_come_again_are_read_by_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other lengths, in other slots, and once there are as many graphs as there may be."""
    monkeypatch.setattr(slots, "MOST_PREFILLS", 3)
    for cache in (LinearCache, HeadsCache):
        monkeypatch.setattr(cache, "prompts_in_graphs", True)
    more = {"sliding_window": 7} if name == "mistral-7b" else {}
    model = linearized("llama3-8b", **FORMS[name]) if name in FORMS else tiny_model(name, **more)
    generator = torch.Generator().manual_seed(2)
    lengths = (*(20, 31, 7, 32) * 2, *(33, 64, 40) * 2, *(70, 90) * 3, 1, 2)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    found: dict[str, list[list[int]]] = {}
    for device in ("cpu", "cuda"):
        engine = Engine(model, device=device, dtype=torch.float32, max_batch=2)
        texts = [engine.submit(prompt, Sampling(tokens=2 + i % 5, temperature=0)) for i, prompt in enumerate(prompts)]
        for _ in engine.stream():
            pass
        found[device] = [text.ids for text in texts]
        assert len(engine._slots._prefills) == (3 if device == "cuda" else 0)
    assert found["cuda"] == found["cpu"]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", ["gpt2-nano", "llama3-8b"])
def test_linearized_layers_read_from_a_graph_as_without_one(name: str, kind: str) -> None:
    """Prompts of other lengths, into other slots, and after the rings have moved on."""
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(6)
    decoder = Decoder(linearized(name, **FORMS[kind]), torch.float32, device, sparse=False, max_length=128)
    recorded, plain = decoder.caches(6, 128), decoder.caches(6, 128)
    own, ids_PT = Prompts.of(0, [64] * 3, device), torch.zeros(3, 64, dtype=torch.long, device=device)
    logits_PV = torch.empty(3, VOCABULARY, device=device)
    graph = captured(lambda: logits_PV.copy_(decoder.prefill(recorded, own, ids_PT)))
    for mine, other in zip(remembered(recorded), remembered(plain), strict=True):
        mine.copy_(other)
    places_B = torch.zeros(6, dtype=torch.int32, device=device)
    for lengths, taken in (([1, 40, 64], [0, 1, 2]), ([64, 5, 4], [4, 0, 3]), ([33, 8, 63], [5, 2, 1])):
        prompts = Prompts(*(torch.tensor(each, device=device) for each in (taken, lengths)))
        new = *prompts, torch.randint(3, VOCABULARY, (3, 64), generator=generator).to(device)
        for kept, given in zip((*own, ids_PT), new, strict=True):
            kept.copy_(given)
        graph.replay()
        torch.testing.assert_close(logits_PV, decoder.prefill(plain, prompts, ids_PT), rtol=0, atol=1e-4)
        places_B[prompts.slots_P] = prompts.lengths_P.int()
        for _ in range(3):
            torch.testing.assert_close(remembered(recorded), remembered(plain), rtol=0, atol=1e-4)
            both = [decoder.decode(caches, places_B.long(), places_B) for caches in (recorded, plain)]
            torch.testing.assert_close(*both, rtol=0, atol=1e-4)
            places_B += 1


def remembered(caches: list[AttentionCache]) -> list[Tensor]:
    """By all layers."""
    return [tensor for cache in caches for tensor in cache.tensors()]

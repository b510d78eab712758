"""Text from a run: repeatable, greedy without temperature, within the positions, with adapters if it has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import copied, slope, trained
from torch.utils._python_dispatch import TorchDispatchMode

from slope_cli.checkpoint.load import load_model
from slope_cli.errors import UsageError
from slope_cli.inference.generate import continue_text
from sparse_kernels import sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = 64


def generated(*words: str, run: Path | None = None) -> str:
    result = slope("generate", run or trained(), *words)
    assert (result.code, result.err) == (0, ""), result
    return result.out


def test_the_seed_decides() -> None:
    first = generated("The ", "--seed", "1", "--tokens", "40", "--temperature", "2")
    assert first.startswith("The ")
    assert generated("The ", "--seed", "1", "--tokens", "40", "--temperature", "2") == first
    assert generated("The ", "--seed", "2", "--tokens", "40", "--temperature", "2") != first


@pytest.mark.parametrize("model", ["gpt2-nano", "opt-125m", "llama3-8b"])
def test_without_temperature_the_likeliest_token_each_time(model: str) -> None:
    _, net, tokenizer, *_ = load_model(trained(model))
    ids = tokenizer("The wind ", return_tensors="pt").input_ids
    for _ in range(8):
        with torch.no_grad():
            best = net(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
        if best.item() == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    for seed in ("0", "7"):
        words = ("The wind ", "--temperature", "0", "--tokens", "8", "--seed", seed)
        assert generated(*words, run=trained(model)) == expected + "\n"


def test_one_likely_token_is_greedy_too() -> None:
    greedy = generated("The ", "--temperature", "0", "--tokens", "20")
    assert generated("The ", "--top-k", "1", "--tokens", "20") == greedy


def tokens_added(prompt: str, tokens: int) -> int:
    """How many tokens the model adds when nothing but their number ends it."""
    _, net, tokenizer, *_ = load_model(trained())
    lengths: list[int] = []
    generate = net.generate
    tokenizer.eos_token = None

    def watched(**more: object) -> torch.Tensor:
        out: torch.Tensor = generate(**more)
        lengths.append(out.shape[1])
        return out

    net.generate = watched
    continue_text(net, tokenizer, prompt, tokens=tokens)
    return lengths[0] - len(prompt)


def test_it_stops_where_the_positions_end() -> None:
    assert tokens_added("The ", 10) == 10
    assert tokens_added("The ", 1000) == POSITIONS - 4
    assert tokens_added("x" * (POSITIONS - 1), 1000) == 1


def test_it_stops_at_the_end_of_text_of_the_tokenizer_used() -> None:
    """OPT's shape says that id 2 ends a text, in bytes an unprintable character; the run's tokenizer says 256."""
    _, net, tokenizer, *_ = load_model(trained("opt-125m"))
    assert net.generation_config.eos_token_id == net.config.eos_token_id == tokenizer.eos_token_id == 256
    for end, expected in [(256, "The "), (2, "The " + "\x02" * 5)]:
        with torch.no_grad():
            net.get_input_embeddings().weight.zero_()
            net.model.decoder.final_layer_norm.weight.zero_()
            net.model.decoder.final_layer_norm.bias.fill_(1.0)
            net.lm_head.weight[end] = 1.0
        assert continue_text(net, tokenizer, "The ", tokens=5, temperature=0) == expected


def test_adapters_take_part() -> None:
    _, net, tokenizer, *_ = load_model(trained())
    with_adapters = continue_text(net, tokenizer, "The ", tokens=30, temperature=0)
    assert generated("The ", "--temperature", "0", "--tokens", "30") == with_adapters + "\n"
    ids = tokenizer("The ", return_tensors="pt").input_ids
    before = net(input_ids=ids).logits
    for _, layer in sparse_layers(net):
        assert layer.adapter is not None
        layer.adapter = None
    assert not torch.allclose(before, net(input_ids=ids).logits, atol=1e-3)


class _Counted(TorchDispatchMode):
    """Counts the operations that make dense weights of kept values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "scatter" in str(operation) or "index_put" in str(operation)
        return operation(*args, **(kwargs or {}))


def test_dense_weights_are_made_once_for_a_text_not_for_each_token() -> None:
    _, net, tokenizer, *_ = load_model(trained())
    counts = []
    for tokens in (4, 40):
        with _Counted() as counted:
            continue_text(net, tokenizer, "The ", tokens=tokens, temperature=0)
        counts.append(counted.count)
    assert counts[0] == counts[1] > 0
    assert all(layer.dense_weight is None for _, layer in sparse_layers(net))


def test_text_is_sampled_in_the_precision_that_is_asked_for() -> None:
    _, net, tokenizer, *_ = load_model(trained())
    dtypes: dict[str, torch.dtype] = {}
    _, layer = next(iter(sparse_layers(net)))
    layer.register_forward_hook(lambda _, inputs, output: dtypes.update({"layer": output.dtype}))
    for dtype in (torch.float32, torch.bfloat16):
        continue_text(net, tokenizer, "The ", tokens=2, dtype=dtype)
        assert dtypes["layer"] == dtype


def test_a_run_that_stopped_before_its_adapters(tmp_path: Path) -> None:
    """Of the checkpoints at 2, 4 and 6, the last two are kept; without the last, none has adapters (they join at 4)."""
    whole = trained("gpt2-nano", "log.save_every=2", "adapters.start=0.67")
    run = copied(whole, tmp_path)
    newest = sorted(run.glob("checkpoints/step-*"))[-1]
    newest.rename(tmp_path / "aside")
    _, net, _, _, manifest, phase = load_model(run)
    assert manifest is not None
    assert phase is not None
    assert (manifest["step"], phase.adapters) == (4, False)
    assert all(layer.adapter is None for _, layer in sparse_layers(net))
    assert generated("The ", run=run).startswith("The ")
    assert generated("The ", run=whole).startswith("The ")


def test_the_model_stays_in_its_mode() -> None:
    _, net, tokenizer, *_ = load_model(trained())
    for training in (True, False):
        net.train(training)
        continue_text(net, tokenizer, "The ", tokens=2)
        assert net.training is training


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: is empty; give some text to continue"),
        ("x" * POSITIONS, "prompt: has 64 tokens and the model only 64 positions; shorten it"),
        ("x" * 1000, "prompt: has 1000 tokens and the model only 64 positions; shorten it"),
    ],
)
def test_a_prompt_that_cannot_be_continued(prompt: str, message: str) -> None:
    assert slope("generate", trained(), prompt) == (2, "", f"error: {message}\n")


def test_a_masked_model_does_not_continue_text() -> None:
    message = "error: BertForPreTraining: predicts masked tokens and cannot continue text; use a causal model\n"
    assert slope("generate", trained("bert-base"), "the") == (2, "", message)
    _, net, tokenizer, *_ = load_model(trained("bert-base"))
    with pytest.raises(UsageError, match="masked"):
        continue_text(net, tokenizer, "the", tokens=1)

"""An export loads with transformers and PEFT and is the run's model; one that is not is refused and leaves nothing."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.data import scratch
from support.runs import OVERRIDES, copied, slope, trained
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from slope_cli.checkpoint.load import load_model
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.inference.export import SOURCE, TOLERANCE, export
from slope_cli.report.tables import bytes_text
from sparse_kernels import adapters_of, sparse_layers
from sparse_kernels import peft as peft_folder

# PEFT asks transformers a question that has a new name there.
PEFTS_OWN = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
pytestmark = PEFTS_OWN

FAMILIES = ["gpt2-nano", "opt-125m", "llama3-8b", "bert-base"]


@cache
def exported(model: str, *more: str) -> Path:
    """The export of a tiny trained run, with all its words."""
    merge = "--merge" in more
    out = scratch() / f"export-{'-'.join([model, *more])}"
    words = [word for word in more if word != "--merge"]
    result = slope("export", trained(model, *words), out, *["--merge"] * merge)
    assert (result.code, result.err) == (0, ""), result
    return out


def auto(model: str) -> Any:
    return transformers.AutoModelForPreTraining if model == "bert-base" else transformers.AutoModelForCausalLM


def logits(model: nn.Module, vocab: int) -> Tensor:
    ids = torch.randint(vocab, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        output = model.eval()(input_ids=ids)
    found: Tensor = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
    return found


def close(loaded: nn.Module, run: PreTrainedModel) -> bool:
    """Whether two models give the same logits, for other tokens than the export's own comparison."""
    vocab = run.config.vocab_size
    expected = logits(run, vocab)
    return bool((logits(loaded, vocab) - expected).abs().max() <= TOLERANCE * expected.abs().max())


def stored_weight(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight")
    return weight.t() if type(layer).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_keep_their_zeros_and_peft_gives_the_runs_logits(family: str) -> None:
    peft = pytest.importorskip("peft")
    out = exported(family)
    _, run, *_ = load_model(trained(family))
    loaded = auto(family).from_pretrained(out)
    layers = dict(sparse_layers(run))
    assert len(layers) >= 7
    for name, layer in layers.items():
        weight = stored_weight(loaded.get_submodule(name))
        assert torch.equal(weight, layer.weight)
        assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        assert torch.equal(weight != 0, layer.row_mask() & (weight != 0))
        assert layer.adapter is not None
        assert layer.adapter.lora_B.abs().max() > 0
    assert not close(loaded, run)
    with_adapters = peft.PeftModel.from_pretrained(loaded, out / peft_folder.FOLDER)
    assert close(with_adapters, run)


def test_a_folder_may_be_given_as_text_and_its_adapters_come_along() -> None:
    out = exported("gpt2-nano")
    loaded = load_model(str(out))
    assert loaded.folder == out
    assert close(loaded.model, load_model(trained("gpt2-nano")).model)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_give_the_runs_logits_without_peft(family: str) -> None:
    out = exported(family, "--merge")
    _, run, *_ = load_model(trained(family))
    assert not (out / peft_folder.FOLDER).exists()
    assert close(auto(family).from_pretrained(out), run)
    assert "merged" in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("adapters.rank=0",),
        ("method=dense",),
        ("adapters.rank=0.2", "adapters.alpha=3"),
        ("sparsity.n=1", "sparsity.m=2", "train.precision=bf16"),
    ],
)
def test_other_runs(more: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft")
    out = exported("gpt2-nano", *more)
    _, run, *_ = load_model(trained("gpt2-nano", *more))
    loaded = auto("gpt2-nano").from_pretrained(out)
    if (out / peft_folder.FOLDER).exists():
        config = json.loads((out / peft_folder.FOLDER / "adapter_config.json").read_text())
        ranks = {config["r"], *config["rank_pattern"].values()}
        assert ranks == {layer.adapter.rank for _, layer in sparse_layers(run) if layer.adapter is not None}
        loaded = peft.PeftModel.from_pretrained(loaded, out / peft_folder.FOLDER)
    else:
        assert "adapters.rank=0" in more or "method=dense" in more
    assert close(loaded, run)


@pytest.mark.parametrize("alpha", ["2", "null"])
def test_each_layer_may_have_a_rank_of_its_own(alpha: str) -> None:
    """A share of the smaller side differs between layers; PEFT must read each one's rank, and alpha with it."""
    peft = pytest.importorskip("peft")
    more = ("model.overrides.num_key_value_heads=1", "adapters.rank=0.25", f"adapters.alpha={alpha}")
    out = exported("llama3-8b", *more)
    config = json.loads((out / peft_folder.FOLDER / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {4}
    assert config["r"] == 8
    assert len({config["lora_alpha"], *config["alpha_pattern"].values()}) == (1 if alpha == "2" else 2)
    _, run, *_ = load_model(trained("llama3-8b", *more))
    assert close(peft.PeftModel.from_pretrained(auto("llama3-8b").from_pretrained(out), out / peft_folder.FOLDER), run)


def test_the_files_name_no_folder_of_this_machine_and_have_the_rights_of_others() -> None:
    files = [path for path in exported("gpt2-nano").rglob("*") if path.is_file()]
    own = [str(folder).encode() for folder in (exported("gpt2-nano").resolve(), trained().resolve())]
    assert [path.name for path in files if any(folder in path.read_bytes() for folder in own)] == []
    assert len(files) > 4
    assert {path.stat().st_mode & 0o777 for path in files} == {exported("gpt2-nano").stat().st_mode & 0o666}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_loads_and_gives_text_back(family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported(family))
    original = load_tokenizer(str(trained(family) / "tokenizer"))
    text = "It is a truth universally acknowledged that a small model knows little."
    assert tokenizer(text).input_ids == original(text).input_ids
    back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert back == (text.lower() if family == "bert-base" else text)


def test_the_export_generates_and_ends_with_the_tokenizers_own_id() -> None:
    out = exported("opt-125m")
    loaded, tokenizer = auto("opt-125m").from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 256
    ids = tokenizer("The ", return_tensors="pt")
    assert loaded.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=256).shape == (1, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_card_says_what_it_is_and_its_code_runs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    card = (exported(family) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "2:4 sparse along the input features" in card
    assert "Trained on: 384 tokens (6 steps)" in card
    changed = ", ".join(word.replace("=", " ") for word in OVERRIDES[family])
    assert f"- Architecture: {family} with {changed}\n" in card
    assert "Validation loss: " in card
    assert f"SparsityCallback(model)`; {SOURCE}.\n" in card
    monkeypatch.chdir(exported(family))
    exec(card.split("```python\n")[1].split("```")[0], {})


def test_the_result_is_printed(tmp_path: Path) -> None:
    result = slope("export", trained(), tmp_path / "new" / "out", "--json")
    record = json.loads(result.out)
    assert (record["folder"], record["step"]) == (str(tmp_path / "new" / "out"), 6)
    assert record["logits_difference"] <= TOLERANCE
    (tmp_path / "empty").mkdir()
    lines = slope("export", trained(), tmp_path / "empty").out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'empty'}: step 6, ")
    size = bytes_text(record["bytes"])
    assert lines[1] == f"weights in float32: {size}; {record['adapters']} layers have adapters"
    assert record["adapters"] == len(adapters_of(load_model(trained()).model)) > 1


def test_a_dense_export_in_16_bits_keeps_the_zeros_and_rounds_the_rest(tmp_path: Path) -> None:
    run = load_model(trained()).model
    record = json.loads(slope("export", trained(), tmp_path / "out", "--dtype", "bfloat16", "--json").out)
    assert 0 < record["logits_difference"] < 0.05
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    loaded = auto("gpt2-nano").from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for name, layer in sparse_layers(run):
        assert torch.equal(stored_weight(loaded.get_submodule(name)), layer.weight.bfloat16())
    merged = json.loads(slope("export", trained(), tmp_path / "m", "--dtype", "float16", "--merge", "--json").out)
    assert 0 < merged["logits_difference"] < record["logits_difference"]
    assert merged["bytes"] < record["bytes"]  # which has the adapters beside it


# -------------------------------------------------------------------------------------------------- refusals


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    for folder in (tmp_path, tmp_path / "letter.txt"):
        result = slope("export", trained(), folder)
        assert (result.code, result.out) == (2, "")
        assert result.err == f"error: {folder}: is not an empty folder; choose another\n"
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("how", ["weights", "adapter"])
def test_what_was_altered_between_save_and_reload_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    def alter(path: Path) -> None:
        tensors = load_file(path)
        next(tensor for name, tensor in tensors.items() if "0" in name and tensor.dim() == 2).flatten()[5] += 3.0
        save_file(tensors, path, metadata={"format": "pt"})

    if how == "weights":
        save = PreTrainedModel.save_pretrained

        def save_then_alter(self: PreTrainedModel, folder: Path, **more: Any) -> None:
            save(self, folder, **more)
            alter(folder / "model.safetensors")

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_then_alter)
    else:
        reload = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

        def alter_then_reload(cls: type[PreTrainedModel], folder: Path, **more: Any) -> PreTrainedModel:
            alter(folder / peft_folder.FOLDER / "adapter_model.safetensors")
            loaded: PreTrainedModel = reload(cls, folder, **more)
            return loaded

        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(alter_then_reload))
    result = slope("export", trained(), tmp_path / "out")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: {tmp_path / 'out'}: not written: the logits of what was saved differ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(self: PreTrainedModel, folder: Path, **more: Any) -> None:
        (folder / "half").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    result = slope("export", trained(), tmp_path / "out")
    assert result == (
        1,
        "",
        f"error: {tmp_path / 'out'}: cannot be written, the disk (or quota) is full: No space left on device\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "half").write_text("")
    assert export(trained(), tmp_path / "out")["step"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_without_a_sound_checkpoint(tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    shard = next(run.glob("checkpoints/step-*/*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    result = slope("export", run, tmp_path / "out")
    assert (result.code, result.out) == (1, "")
    assert shard.name in result.err


def test_the_name_of_a_runs_folder_is_no_markdown_in_the_model_card(tmp_path: Path) -> None:
    name = "a\x1b[31m<b>[x](y)`*_"
    run = copied(trained(), tmp_path).rename(tmp_path / name)
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# a\\\\x1b\\[31m\\<b\\>\\[x\\](y)\\`\\*\\_\n" in card
    assert "\x1b" not in card

"""A packed export loads in slope and in transformers, is the run's model, and is never loaded wrong."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.data import prepared, scratch
from support.runs import slope, trained
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import sparse_kernels.transformers as plugin
from slope_cli.checkpoint.load import load_model
from slope_cli.inference.export import SOURCE, TOLERANCE
from slope_cli.linearize.swap import linear_windows
from sparse_kernels import adapters_of, masks, sparse_layers, tile_metadata
from sparse_kernels.packing import packed_linears

FAMILIES = ["gpt2-nano", "opt-125m", "llama3-8b", "bert-base"]
ROOT = Path(__file__).parents[1]


def exported(model: str = "llama3-8b", dtype: str = "bfloat16") -> Path:
    """The packed export of a tiny trained run. Copy it before you alter it."""
    out = scratch() / f"packed-{model}-{dtype}"
    if not out.exists():
        result = slope("export", "--format", "packed", "--dtype", dtype, trained(model), out)
        assert (result.code, result.err) == (0, ""), result
    return out


def altered(folder: Path) -> Path:
    return Path(shutil.copytree(exported(), folder / "copy"))


def auto(model: str) -> Any:
    return transformers.AutoModelForPreTraining if model == "bert-base" else transformers.AutoModelForCausalLM


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(250, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        output = model.eval()(input_ids=ids)
    found: Tensor = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
    return found.float()


def difference(model: nn.Module, other: nn.Module) -> float:
    expected = logits(other)
    return float((logits(model) - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_the_runs_model(family: str) -> None:
    run, tokenizer = load_model(trained(family))[1:3]
    exact = auto(family).from_pretrained(exported(family, "float32"))
    assert difference(exact, run) <= TOLERANCE
    sparse, packed = dict(sparse_layers(run)), packed_linears(exact)
    assert packed.keys() == sparse.keys()
    for name, layer in packed.items():
        assert torch.equal(layer.dense(), sparse[name].weight)
        assert layer.lora_A is not None
    assert not any(p.requires_grad for p in exact.parameters())
    rounded = auto(family).from_pretrained(exported(family))
    assert rounded.dtype == torch.bfloat16
    assert {layer.values.dtype for layer in packed_linears(rounded).values()} == {torch.bfloat16}
    assert difference(auto(family).from_pretrained(exported(family), dtype=torch.float32), run) < 0.05
    assert AutoTokenizer.from_pretrained(exported(family))("A text.") == tokenizer("A text.")
    loaded = load_model(exported(family, "float32")).model
    assert torch.equal(logits(loaded), logits(exact))


def test_the_files_are_what_is_documented() -> None:
    folder = exported()
    names = {path.name for path in folder.iterdir()}
    weights = "packed-00001-of-00001.safetensors"
    assert names == {
        *("README.md", "config.json", "generation_config.json", weights, plugin.INDEX),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    index = json.loads((folder / plugin.INDEX).read_text())
    assert set(index["metadata"]["sha256"]) == names - {"README.md", plugin.INDEX}
    tensors = load_file(folder / weights)
    assert index["weight_map"] == dict.fromkeys(tensors, weights)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["dtype"]) == ("slope", 1, "bfloat16")
    run = load_model(trained("llama3-8b")).model
    assert config["layers"].keys() == dict(sparse_layers(run)).keys()
    for name, layer in config["layers"].items():
        (rows, columns), rank = layer["shape"], layer["rank"]
        assert tensors[f"{name}.values"].shape == (rows, columns // 2)
        assert torch.equal(tensors[f"{name}.metadata"], tile_metadata.encode(run.get_submodule(name).row_mask()))
        assert tensors[f"{name}.lora_A"].shape == (rank, columns)
        assert tensors[f"{name}.lora_B"].shape == (rows, rank)
        assert f"{name}.weight" not in tensors


def test_large_models_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "SHARD", "20KB")
    assert slope("export", "--format", "packed", trained("llama3-8b"), tmp_path / "out").code == 0
    count = len(list((tmp_path / "out").glob("packed-*-of-*.safetensors")))
    assert count >= 3
    assert not list((tmp_path / "out").glob("model*"))
    loaded = auto("llama3-8b").from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(auto("llama3-8b").from_pretrained(exported())))


def test_the_result_is_printed_and_the_card_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(slope("export", "--format", "packed", "--json", trained(), tmp_path / "out").out)
    assert (record["folder"], record["step"], record["packed"]) == (str(tmp_path / "out"), 6, 7)
    assert record["dense"] == {
        "transformer.h.0.attn.c_attn": "not 2:4 along its inputs",
        "lm_head": "output head",
    }
    assert 0 < record["logits_difference"] < 0.05
    model = load_model(trained()).model
    assert record["adapters"] == len(adapters_of(model)) > 0
    assert record["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    adapters = sum(p.numel() for adapter in adapters_of(model).values() for p in adapter.parameters())
    dense = type(model)(model.config).num_parameters() + adapters
    assert record["dense_bytes"] == 2 * dense > record["bytes"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "7 packed 2:4 sparse in bfloat16, format 1 of slope; 2 dense" in card
    assert f"after `import sparse_kernels.transformers`; {SOURCE}\n" in card
    monkeypatch.chdir(tmp_path / "out")
    exec(card.split("```python\n")[1].split("```")[0], {})


# ----------------------------------------------------------------------------------------------- in transformers


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


LOAD = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__, error)
print([name for name in sys.modules if name.startswith(("slope", "sparse_kernels"))])
"""


@pytest.mark.slow
def test_a_load_without_the_plugin_fails_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = altered(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # as transformers' warning advises
    (folder / "config.json").write_text(json.dumps(config))
    *errors, modules = python(LOAD, exported(), folder).stdout.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("ValueError Can't find a checkpoint index (")
        assert "import-sparse_kernels.transformers-to-load-this" in error
    assert modules == "[]"


GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
import sparse_kernels.transformers
pipe = pipeline("text-generation", model=sys.argv[1], dtype=torch.float32, device="cpu")
print(repr(pipe("The ", max_new_tokens=8, do_sample=False)[0]["generated_text"]))
print(type(pipe.model.model.layers[1].mlp.up_proj).__name__)
print([name for name in sys.modules if name.startswith("slope_cli")])
"""


@pytest.mark.slow
def test_a_pipeline_gives_the_runs_text_with_the_plugin_alone() -> None:
    text, kind, modules = python(GENERATE, exported("llama3-8b", "float32")).stdout.splitlines()
    words = ("The ", "--tokens", "8", "--temperature", "0")
    assert slope("generate", trained("llama3-8b"), *words).out == f"{eval(text)}\n"
    assert (kind, modules) == ("PackedLinear", "[]")


def test_arguments_of_from_pretrained() -> None:
    kind, folder = auto("gpt2-nano"), exported("gpt2-nano")
    half = kind.from_pretrained(folder, dtype=torch.float16, device_map="cpu")
    layer = half.transformer.h[1].mlp.c_fc
    assert (layer.values.dtype, layer.bias.dtype, layer.lora_B.dtype) == (torch.float16,) * 3
    assert layer.metadata.dtype == torch.uint8
    assert half.lm_head.weight is half.transformer.wte.weight
    assert difference(half, kind.from_pretrained(folder, dtype="float32", device_map="auto")) < 0.01
    base, whole = transformers.AutoModel.from_pretrained(folder), kind.from_pretrained(folder)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.transformer(ids).last_hidden_state)
    with pytest.raises(ValueError, match=r"packed layers are in bfloat16, float16, float32, not in torch\.float64"):
        kind.from_pretrained(folder, dtype=torch.float64)


def test_a_loaded_model_is_for_inference_alone_and_can_be_compiled(tmp_path: Path) -> None:
    model = auto("llama3-8b").from_pretrained(exported(), dtype=torch.float32)
    assert (model.is_quantized, model.hf_quantizer.is_trainable, model.hf_quantizer.is_compileable) == (
        True,
        False,
        True,
    )
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), logits(model))


# ------------------------------------------------------------------------------- the reference loader of docs/


def loader() -> Any:
    spec = importlib.util.spec_from_file_location("packed_loader", ROOT / "docs" / "packed_loader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_loader_gives_the_same_logits(family: str) -> None:
    folder = exported(family)
    packed = auto(family).from_pretrained(folder, dtype=torch.float32)
    dense = auto(family).from_config(packed.config, dtype=torch.float32)
    tensors = loader().dense(folder, torch.float32)
    for name in packed_linears(packed):
        if type(dense.get_submodule(name)).__name__ == "Conv1D":
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].t()
    missing, unexpected = dense.load_state_dict(tensors, strict=False)
    assert set(missing) <= set(dense.all_tied_weights_keys)
    assert not unexpected
    dense.tie_weights()
    assert difference(dense, packed) <= TOLERANCE


def test_the_reference_loaders_layers_and_its_checks(tmp_path: Path) -> None:
    source = (ROOT / "docs" / "packed_loader.py").read_text()
    assert len(source.splitlines()) < 100
    packed = auto("llama3-8b").from_pretrained(exported())
    layers = loader().load(exported())[1]
    X = torch.randn(3, 32, dtype=torch.bfloat16)
    assert layers.keys() == packed_linears(packed).keys()
    for name, layer in packed_linears(packed).items():
        assert torch.equal(layers[name].weight(), layer.dense())
        if layer.in_features == 32:
            assert torch.equal(layers[name](X), layer(X))
    folder = altered(tmp_path)
    weights = folder / "packed-00001-of-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="is damaged"):
        loader().load(folder)


# ---------------------------------------------------------------------------------------------------- damage


def refused(folder: Path) -> str:
    """The error that both doors give."""
    with pytest.raises(ValueError) as found:  # noqa: PT011 - the caller looks at it
        auto("llama3-8b").from_pretrained(folder)
    result = slope("generate", folder, "The ")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: {folder}: cannot be loaded as a model (")
    return str(found.value)


@pytest.mark.parametrize("name", ["packed-00001-of-00001.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    folder = altered(tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(content)
    assert refused(folder) == f"{folder / name}: is missing or not what was written, by its SHA-256 in {plugin.INDEX}"


def test_missing_and_foreign_files_are_found(tmp_path: Path) -> None:
    folder = altered(tmp_path)
    weights = folder / "packed-00001-of-00001.safetensors"
    index = json.loads((folder / plugin.INDEX).read_text())
    weights.rename(folder / "other")
    assert "packed-00001-of-00001.safetensors: is missing" in refused(folder)
    (folder / "other").rename(weights)
    (folder / "generation_config.json").unlink()  # a download may leave it out
    auto("llama3-8b").from_pretrained(folder)
    del index["metadata"]["sha256"][weights.name]
    (folder / plugin.INDEX).write_text(json.dumps(index))
    assert refused(folder).endswith(f"has no hash of {weights.name}")
    del index["metadata"]["sha256"]
    (folder / plugin.INDEX).write_text(json.dumps(index))
    assert "cannot be read as the index of a packed model" in refused(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 2}, "packed in format 2, and this slope reads up to 1: install a newer one"),
        (
            {"layers": {"model.layers.7.mlp.up_proj": {"shape": [64, 32], "rank": 4, "bias": False}}},
            r"LlamaForCausalLM has no layer model.layers.7.mlp.up_proj of [64, 32], which is packed",
        ),
        (
            {"layers": {"model.layers.1.mlp.up_proj": {"shape": [64, 36], "rank": 4, "bias": False}}},
            r"LlamaForCausalLM has no layer model.layers.1.mlp.up_proj of [64, 36], which is packed",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    folder = altered(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    rehash(folder)
    assert refused(folder) == error


def rehash(folder: Path) -> None:
    """What a writer of its own would do."""
    index = json.loads((folder / plugin.INDEX).read_text())
    index["metadata"]["sha256"] = plugin._hashes(folder, sorted(index["metadata"]["sha256"]))
    (folder / plugin.INDEX).write_text(json.dumps(index))


def test_metadata_of_a_faulty_writer_is_refused(tmp_path: Path) -> None:
    folder = altered(tmp_path)
    weights = folder / "packed-00001-of-00001.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.metadata"][3] = 0
    save_file(tensors, weights, metadata={"format": "pt"})
    rehash(folder)
    assert refused(folder) == "model.layers.1.mlp.up_proj.metadata is no 2:4 metadata"


# ------------------------------------------------------------------------------------------------- in slope


def test_slope_evaluates_and_generates(tmp_path: Path) -> None:
    folder, data = exported("llama3-8b", "float32"), prepared("bytes")
    words = ("--data", data, "--tokens", "256", "--seq-len", "32", "--out", tmp_path / "result.json")
    losses = []
    for model in (trained("llama3-8b"), folder):
        assert slope("eval", model, *words).code == 0
        losses.append(json.loads((tmp_path / "result.json").read_text())["perplexity"]["loss"])
        (tmp_path / "result.json").unlink()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    greedy = ("The ", "--tokens", "8", "--temperature", "0")
    assert slope("generate", folder, *greedy) == slope("generate", trained("llama3-8b"), *greedy)


def test_linear_attention_comes_along(tmp_path: Path) -> None:
    words = ("train.steps=5", "linearize.window=2", "adapters.rank=4", "log.tensorboard=false", "log.val_tokens=128")
    run = tmp_path / "run"
    assert slope("linearize", trained("opt-125m"), *words, "log.sample_prompt='The '", "--out", run).code == 0
    exact = ("export", "--format", "packed", "--dtype", "float32")
    assert slope(*exact, run, tmp_path / "packed").code == 0
    packed, expected = load_model(tmp_path / "packed").model, load_model(run).model
    assert len(linear_windows(packed)) == 2
    assert len(packed_linears(packed)) == 9
    assert difference(packed, expected) <= TOLERANCE
    assert slope("export", run, tmp_path / "dense").code == 0
    assert slope(*exact, tmp_path / "dense", tmp_path / "again").code == 0
    assert difference(load_model(tmp_path / "again").model, expected) <= TOLERANCE
    card = (tmp_path / "again" / "README.md").read_text()
    assert "transformers gives softmax attention" in card


def test_a_packed_folder_is_no_start_for_training_and_is_not_packed_again(tmp_path: Path) -> None:
    says = "is packed for inference; give the run or the folder that it was made of"
    folder, out = exported("gpt2-nano"), tmp_path / "out"
    for words in (
        ("export", "--format", "packed", folder, out / "packed"),
        ("linearize", folder, "--out", out / "run"),
        ("finetune", exported("bert-base"), "mrpc"),
    ):
        result = slope(*words)
        assert result.code == 2, result
        assert says in result.err
    assert not (out / "packed").exists()


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    for option, words in (
        ("--merge", ("--format", "packed", "--merge", trained(), tmp_path / "out")),
        ("--dtype", ("--dtype", "float16", trained(), "--push", "a/b")),
    ):
        result = slope("export", *words)
        assert result.code == 2
        assert result.err.startswith(f"error: {option}: ")


# --------------------------------------------------------------------------------------- folders of others


def others(folder: Path, *, zeros: bool = True) -> PreTrainedModel:
    """A model that somebody else pruned: every linear layer of its blocks but one, the first ones too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=272, max_position_embeddings=64, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if zeros and isinstance(layer, nn.Linear) and name not in ("lm_head", "model.layers.1.mlp.up_proj"):
                layer.weight *= masks.row_mask(layer.weight, 2, 4)  # leaves -0.0
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(exported()).save_pretrained(folder)
    return auto("llama3-8b").from_pretrained(folder, dtype=torch.float32)


def test_any_folder_with_zeros_in_place_can_be_packed(tmp_path: Path) -> None:
    model = others(tmp_path / "theirs")
    record = json.loads(slope("export", "--format", "packed", "--json", tmp_path / "theirs", tmp_path / "out").out)
    assert (record["step"], record["packed"]) == (None, 13)
    assert record["dense"] == {
        "model.layers.1.mlp.up_proj": "not 2:4 along its inputs",
        "lm_head": "output head",
    }
    packed = auto("llama3-8b").from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(packed, model) <= TOLERANCE
    layer = packed.model.layers[0].self_attn.q_proj
    assert not torch.signbit(layer.dense()[layer.dense() == 0]).any()
    assert layer.lora_A is layer.bias is None


def test_a_folder_without_such_layers_is_refused(tmp_path: Path) -> None:
    others(tmp_path / "theirs", zeros=False)
    result = slope("export", "--format", "packed", tmp_path / "theirs", tmp_path / "out")
    says = "cannot be packed: no linear layer of LlamaForCausalLM is 2:4 along its inputs"
    assert (result.code, result.err) == (2, f"error: {tmp_path / 'theirs'}: {says}\n")
    assert not (tmp_path / "out").exists()


def test_an_export_with_its_adapters_is_packed_like_its_run(tmp_path: Path) -> None:
    assert slope("export", trained("opt-125m"), tmp_path / "dense").code == 0
    words = ("export", "--format", "packed", "--dtype", "float32")
    assert slope(*words, tmp_path / "dense", tmp_path / "packed").code == 0
    ours, theirs = (
        load_file(folder / "packed-00001-of-00001.safetensors")
        for folder in (exported("opt-125m", "float32"), tmp_path / "packed")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

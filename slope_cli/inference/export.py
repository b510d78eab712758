"""A trained run as a folder that transformers and PEFT load, checked before it is called done."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from slope_cli.checkpoint import run_model
from slope_cli.checkpoint.base_model import BASE
from slope_cli.checkpoint.hf_folder import ADAPTER
from slope_cli.config.schema import INIT, Config
from slope_cli.data.tokenizer import save_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.linearize import saved
from slope_cli.linearize.swap import linear_windows, restore_attention
from slope_cli.methods import phases
from slope_cli.models import shapes
from slope_cli.report import metrics
from slope_cli.utils.files import atomic_folder, read_sealed
from sparse_kernels import LowRankAdapter, adapted_layers, adapters_of, densify, masked_layers, sparse_layers

TOLERANCE = 2e-4
"""Largest difference of float32 logits, relative to their largest magnitude, that reloading may make."""


def export(run: Path, out: Path, *, merge: bool = False) -> dict[str, Any]:
    """Write a run's model to the folder `out`: weights with their zeros, tokenizer, model card, adapters beside them.

    The folder appears when all of it is written, read back and compared, and not before.

    Args:
        merge: add the adapters to the weights instead; these are then no longer N:M sparse.

    Returns:
        What was written: the folder, the step, the largest relative difference of the reloaded model's logits.

    Raises:
        UsageError: `out` is not empty, or `run` is no run.
        SlopeError: no sound checkpoint, or the reloaded model's logits differ.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not an empty folder; choose another")
    out = out.resolve()
    logging.disable_progress_bar()  # a bar that is full at once, in the middle of a log
    config, model, tokenizer, manifest = run_model.load(run)
    expected = _logits(model)
    adapters, linear = adapters_of(model), bool(linear_windows(model))
    conv1d = {name for name, layer in adapted_layers(model) if layer.conv1d}
    patterns = dict.fromkeys(f"{x.n}:{x.m}" for _, x in (*sparse_layers(model), *masked_layers(model)))
    densify(model, adapters="merge" if merge else "drop")
    pattern = " and ".join(patterns)
    card = _model_card(run, config, model, manifest, adapters, merged=merge, pattern=pattern, linear=linear)
    try:
        with atomic_folder(out) as folder:
            if linear:
                saved.write(folder / saved.FOLDER, model, config.linear_attention)
                restore_attention(model)
            model.save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
            if adapters and not merge:
                _write_adapter(folder / ADAPTER, adapters, conv1d, model, base=out)
            (folder / "README.md").write_text(card, encoding="utf-8")
            reloaded = type(model).from_pretrained(folder)
            if adapters and not merge:
                _merge_adapter(reloaded, folder / ADAPTER)
            if linear:
                saved.read(folder / saved.FOLDER, reloaded)
            difference = _difference(_logits(reloaded), expected)
            if not difference <= TOLERANCE:
                reason = f"the logits of what was saved differ by {difference:.1e} of their size"
                raise SlopeError(f"{out}: not written: {reason}")
    except SafetensorError as error:  # on a full disk, for one
        raise SlopeError(f"{out}: cannot be written: {error}") from None
    return {"folder": str(out), "step": manifest["step"], "logits_difference": difference}


def _logits(model: PreTrainedModel) -> Tensor:
    """Logits of fixed pseudo-random tokens: (2, T, vocabulary), float32."""
    length = min(64, shapes.max_seq_len(model.config))
    ids_BT = torch.randint(shapes.vocab_size(model.config), (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.eval()(input_ids=ids_BT)
    logits: Tensor = output.prediction_logits if shapes.objective(model.config) == "masked" else output.logits
    return logits


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _write_adapter(
    out: Path, adapters: dict[str, LowRankAdapter], conv1d: set[str], model: PreTrainedModel, *, base: Path
) -> None:
    """A LoRA folder in PEFT's format: lora_A (rank, in), lora_B (out, rank), scale = lora_alpha / rank."""
    out.mkdir()
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    alphas = {name: adapter.scale * adapter.rank for name, adapter in adapters.items()}
    first = next(iter(adapters))
    task = {"task_type": "CAUSAL_LM"} if shapes.objective(model.config) == "causal" else {}
    config = {
        "peft_type": "LORA",
        **task,
        "base_model_name_or_path": str(base),
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": sorted(adapters),
        "fan_in_fan_out": bool(conv1d),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.B.detach().contiguous()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


def _merge_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Add a LoRA folder's product to a reloaded model's weights, as PEFT would; reads only what is on disk."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in config["target_modules"]:
        A_RI, B_OR = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        delta_OI = (alpha / A_RI.shape[0]) * (B_OR @ A_RI)
        with torch.no_grad():
            model.get_submodule(name).weight.add_(delta_OI.t() if config["fan_in_fan_out"] else delta_OI)


def _architecture(run: Path, config: Config) -> str:
    """The shape's name and what the run changed of it, or the family and its sizes."""
    if config.model.name == INIT:
        settings = read_sealed(run / BASE)["config"]
        family = settings["model_type"]
        sizes = {name: settings.get(name) for name in shapes.FAMILIES[family].sizes}
        return f"{family} with " + ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)
    changed = ", ".join(f"{name} {value}" for name, value in config.model.overrides.items())
    return f"{config.model.name} with {changed}" if changed else config.model.name


def _model_card(
    run: Path,
    config: Config,
    model: PreTrainedModel,
    manifest: dict[str, Any],
    adapters: dict[str, LowRankAdapter],
    *,
    pattern: str,
    merged: bool,
    linear: bool,
) -> str:
    """README.md of the export, from the run's own records."""
    val = [r for r in metrics.read(run) if r["kind"] == "val" and r["step"] <= manifest["step"]]
    tokens = manifest["step"] * config.train.tokens_per_step
    layers = phases.stage(config, manifest["step"] - 1).layers
    if layers in ("dense", "lifted") or not pattern:
        weights = "dense"
    elif merged and adapters:
        weights = f"trained {pattern} sparse; low-rank adapters are merged, so the weights here are dense"
    else:
        weights = f"{pattern} sparse along the input features, stored dense with their zeros"
    tags = "[slope, pretrained]" if weights == "dense" else "[slope, sparse, pretrained]"
    lines = [
        "---",
        f"library_name: {'slope-cli' if linear else 'transformers'}",
        f"tags: {'[slope, linearized]' if linear else tags}",
        "---",
        f"# {run.resolve().name}",
        "",
        f"- Architecture: {_architecture(run, config)}",
        f"- Linear weights: {weights}",
        f"- {'Linearized' if linear else 'Trained'} on: {tokens:,} tokens ({manifest['step']:,} steps)",
    ]
    if val:
        lines.append(f"- Validation loss: {val[-1]['loss']:.4f} nats per token at step {val[-1]['step']:,}")
    auto = "AutoModelForCausalLM" if shapes.objective(model.config) == "causal" else "AutoModelForPreTraining"
    code = [f"from transformers import {auto}, AutoTokenizer"]
    code += ["", f'model = {auto}.from_pretrained(".")', 'tokenizer = AutoTokenizer.from_pretrained(".")']
    if adapters and not merged:
        rank = next(iter(adapters.values())).rank
        lines.append(f"- Low-rank adapters, rank {rank}: the PEFT folder `{ADAPTER}/`; without them quality is lower")
        code = ["from peft import PeftModel", *code, f'model = PeftModel.from_pretrained(model, "{ADAPTER}")']
    if linear:
        lines.append("- Attention: window softmax plus linear (slope linearize), maps in `linearize/`")
        lines.append("- Loads with: slope; transformers' from_pretrained gives softmax attention, without the maps")
        code = ["from pathlib import Path", "", "from slope_cli.checkpoint.load import load", ""]
        code += ['model, tokenizer = load(Path("."))[1:3]']
    return "\n".join([*lines, "", "```python", *code, "```"]) + "\n"

"""Export for inference: 2:4 layers as kept values and metadata, in a folder for sparse_kernels.transformers."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from slope_cli.checkpoint import hf_folder
from slope_cli.checkpoint.load import Loaded, load_model
from slope_cli.data.tokenizer import save_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.inference.export import (
    ROUNDING,
    SOURCE,
    adapters_text,
    empty_folder,
    relative_difference,
    require_same_logits,
    sample_logits,
    weight_bytes,
)
from slope_cli.linearize import saved
from slope_cli.linearize.swap import linear_windows, restore_attention
from slope_cli.report.tables import bytes_text, counted, plain_in_markdown
from slope_cli.utils.files import atomic_folder
from sparse_kernels import adapters_of, sparse_layers
from sparse_kernels.packing import pack_layers, packed_linears
from sparse_kernels.transformers import VERSION, save_packed


def export_packed(source: Path, out: Path, dtype_name: str = "bfloat16") -> dict[str, Any]:
    """Write a model to the folder `out`, its 2:4 layers packed, its adapters beside them.

    The folder appears when all of it is written, read back and compared, and not before.

    Args:
        source: a run, an export, or any folder of a model that transformers reads, with zeros in its weights.
        dtype_name: of all weights: bfloat16, float16 or float32.

    Returns:
        What was written: the folder, the step (None for a folder), the dtype, how many layers are packed, which linear
        layers stay dense and why, and by how much rounding changes float32 logits, relative to the largest magnitude.

    Raises:
        UsageError: `out` is not empty, `source` is no run and no model, is packed already, or has no 2:4 layer.
        SlopeError: no sound checkpoint, weights that the dtype cannot hold, or the reloaded model's logits differ.
    """
    out, dtype = empty_folder(out), getattr(torch, dtype_name)
    hf_folder.require_trainable(source)
    loaded = load_model(source)
    model = loaded.model
    original = sample_logits(model)
    pruned = sum(layer.weight.numel() - layer.values.numel() for _, layer in sparse_layers(model))
    dense_bytes = dtype.itemsize * (sum(p.numel() for p in model.parameters()) + pruned)
    adapters = len(adapters_of(model))
    try:
        dense = pack_layers(model, dtype)
    except ValueError as error:
        raise UsageError(f"{source}: cannot be packed: {error}") from None
    _round(model, dtype)
    expected = sample_logits(model)
    rounding = relative_difference(expected, original)
    if not rounding <= ROUNDING:
        reason = f"rounding to {dtype_name} changes the logits by {rounding:.1e} of their size"
        raise SlopeError(f"{out}: not written: {reason}; choose another dtype")
    packed, linearized = len(packed_linears(model)), bool(linear_windows(model))
    logging.disable_progress_bar()  # they would only clutter the log
    try:
        with atomic_folder(out) as folder:
            if linearized:
                _write_maps(loaded, folder / saved.FOLDER)
                restore_attention(model)
            save_tokenizer(loaded.tokenizer, folder)
            save_packed(model, folder, dtype)
            card = _model_card(loaded, packed, len(dense), dtype_name, linearized=linearized)
            (folder / "README.md").write_text(card, encoding="utf-8")
            reloaded, _ = hf_folder.load(folder, "cpu")
            require_same_logits(reloaded, expected, out)
    except SafetensorError as error:  # on a full disk, for one
        raise SlopeError(f"{out}: cannot be written: {error}") from None
    written = {"folder": str(out), "step": loaded.step, "dtype": dtype_name, "packed": packed, "dense": dense}
    written |= {"adapters": adapters, "bytes": weight_bytes(out), "dense_bytes": dense_bytes}
    return written | {"logits_difference": rounding}


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """What `export_packed` wrote, as text."""
    packed, dense = result["packed"], result["dense"]
    rounding = f"rounding changes the logits by {result['logits_difference']:.1e} of their size"
    layers = [f"  {name}: {reason}" for name, reason in dense.items()]
    first = f"{result['folder']}: {packed} layers packed in {result['dtype']}; {rounding}"
    sizes = f"{bytes_text(result['bytes'])}, dense in {result['dtype']} {bytes_text(result['dense_bytes'])}"
    second = f"weights: {sizes}; {adapters_text(result['adapters'])}"
    return [first, second, f"{counted(len(dense), 'linear layer')} stay{'s' * (len(dense) == 1)} dense:", *layers]


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters the values that they are stored with, but for the maps of linear attention."""
    maps = {id(p) for window in linear_windows(model).values() for p in window.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in maps:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _write_maps(loaded: Loaded, folder: Path) -> None:
    """Write what linearizing added to a model, as an export has it."""
    if loaded.config is None:
        shutil.copytree(loaded.folder / saved.FOLDER, folder)
    else:
        saved.write(folder, loaded.model, loaded.config.linearize, seed=loaded.config.train.seed)


def _model_card(loaded: Loaded, packed: int, dense: int, dtype: str, *, linearized: bool) -> str:
    """README.md of the folder."""
    auto = "AutoModelForCausalLM" if loaded.objective == "causal" else "AutoModelForPreTraining"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [slope, sparse]",
        "---",
        f"# {plain_in_markdown(loaded.name)}",
        "",
        f"- Linear layers: {packed} packed 2:4 sparse in {dtype}, format {VERSION} of slope; {dense} dense",
        "- Low-rank adapters, if the model has any, are part of the packed layers",
        f"- Loads with: slope, or transformers after `import sparse_kernels.transformers`; {SOURCE}",
        "- For inference alone",
    ]
    if linearized:
        lines.append("- Attention: window softmax plus linear, with slope alone; transformers gives softmax attention")
    code = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        "import sparse_kernels.transformers",
        "",
        f'model = {auto}.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ]
    return "\n".join([*lines, "", "```python", *code, "```"]) + "\n"

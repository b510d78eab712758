"""Export of a trained run as a folder that transformers and PEFT load, checked before it appears."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from slope_cli.checkpoint import base_model, run_folder
from slope_cli.checkpoint.load import Loaded, load_model
from slope_cli.config.schema import INIT, Config
from slope_cli.data.tokenizer import save_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.linearize import saved
from slope_cli.linearize.swap import linear_windows, restore_attention
from slope_cli.models import shapes
from slope_cli.models.loss import forward
from slope_cli.report import metrics
from slope_cli.report.tables import bytes_text, counted, plain_in_markdown
from slope_cli.utils.files import atomic_folder
from sparse_kernels import adapters_of, masked_layers, peft, sparse_layers, sparse_relu, to_dense

TOLERANCE = 2e-4
"""Largest difference of float32 logits, relative to their largest magnitude, that reloading may make."""
ROUNDING = 0.1
"""The same, that rounding the weights to 16 bits may make."""


SOURCE = "the package is slope-cli, which is installed from its repository and is not on PyPI"
"""What a model card says of where this program is to be had."""


def export(run: Path, out: Path, *, merge: bool = False, dtype_name: str = "float32") -> dict[str, Any]:
    """Write a run's model to the folder `out`: weights with their zeros, tokenizer, model card, adapters beside them.

    The folder appears when all of it is written, read back and compared, and not before.

    Args:
        merge: add the adapters to the weights instead; these are then no longer N:M sparse.
        dtype_name: of the weights: bfloat16, float16 or float32; adapters and maps are in float32.

    Returns:
        What was written: the folder, the step, the dtype, how many layers have adapters, the bytes of all weight files,
        the largest relative difference of the reloaded model's logits in float32, which rounding makes.

    Raises:
        UsageError: `out` is not empty, or `run` is no run.
        SlopeError: no sound checkpoint, weights that the dtype cannot hold, or the reloaded model's logits differ.
    """
    out = empty_folder(out)
    run_folder.require_run(run_folder.place(str(run))[0])
    loaded = load_model(run)
    config, model = loaded.config, loaded.model
    assert config is not None
    adapters = len(adapters_of(model))
    how: dict[str, Any] = {"merge": merge, "linearized": config if linear_windows(model) else None}
    how["dtype"] = getattr(torch, dtype_name)
    difference = write(out, model, loaded.tokenizer, loaded.name, _facts(loaded, config), **how)
    result = {"folder": str(out), "step": loaded.step, "dtype": dtype_name, "adapters": adapters, "merged": merge}
    return result | {"bytes": weight_bytes(out), "logits_difference": difference}


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """What `export` wrote, as text."""
    difference = f"reloaded logits differ by {result['logits_difference']:.1e} of their size"
    merged = ", which are merged" if result["merged"] and result["adapters"] else ""
    return [
        f"{result['folder']}: step {result['step']}, {difference}",
        f"weights in {result['dtype']}: {bytes_text(result['bytes'])}; {adapters_text(result['adapters'])}{merged}",
    ]


def adapters_text(count: int) -> str:
    """How many layers have adapters."""
    return f"{counted(count, 'layer')} {'has' if count == 1 else 'have'} adapters" if count else "no layer has adapters"


def weight_bytes(folder: Path) -> int:
    """The bytes of all weight files in an export, those of adapters and maps too."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def write(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    facts: Sequence[str],
    *,
    merge: bool = False,
    linearized: Config | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Write a model to a folder that is not there yet or empty, as `export` does; the model becomes dense, in place.

    Args:
        model: on the CPU.
        name, facts: the title of the model card, and lines for its list.
        linearized: the run's configuration if its attention is linear.
        dtype: of the weights as they are stored; adapters and maps are in float32.

    Returns:
        The largest difference of the reloaded model's logits, relative to their largest magnitude.

    Raises:
        SlopeError: the reloaded model's logits differ, or a full disk.
    """
    logging.disable_progress_bar()  # they would only clutter the log
    expected, adapters = sample_logits(model), adapters_of(model)
    card = _model_card(model, name, facts, merged=merge)
    try:
        with atomic_folder(out) as folder:
            if adapters and not merge:
                peft.write(folder / peft.FOLDER, model)
            to_dense(model, adapters="merge" if merge else "drop")
            if linearized is not None:
                saved.write(folder / saved.FOLDER, model, linearized.linearize, seed=linearized.train.seed)
                restore_attention(model)
            model.to(dtype).save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            reloaded = type(model).from_pretrained(folder, dtype=torch.float32)
            if adapters and not merge:
                peft.merge(reloaded, folder / peft.FOLDER)
            if linearized is not None:
                saved.read(folder / saved.FOLDER, reloaded)
            return require_same_logits(reloaded, expected, out, TOLERANCE if dtype == torch.float32 else ROUNDING)
    except SafetensorError as error:  # on a full disk, for one
        raise SlopeError(f"{out}: cannot be written: {error}") from None


def empty_folder(out: Path) -> Path:
    """The absolute path of a folder to write; UsageError if there is one that is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not an empty folder; choose another")
    return out.resolve()


def sample_logits(model: PreTrainedModel) -> Tensor:
    """Logits of fixed pseudo-random tokens: (2, T, vocabulary), float32."""
    length = min(64, model.config.max_position_embeddings)
    ids_BT = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return forward(model.eval(), {"input_ids": ids_BT}).logits


def require_same_logits(reloaded: PreTrainedModel, expected: Tensor, out: Path, tolerance: float = TOLERANCE) -> float:
    """The largest difference of a model's sample logits from those expected, relative to their largest magnitude.

    SlopeError if it is more than the tolerance, or not a number.
    """
    difference = relative_difference(sample_logits(reloaded), expected)
    if not difference <= tolerance:
        reason = f"the logits of what was saved differ by {difference:.1e} of their size"
        raise SlopeError(f"{out}: not written: {reason}")
    return difference


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """The largest difference of logits from those expected, relative to the largest magnitude."""
    return float((logits - expected).abs().max() / expected.abs().max())


def _architecture(run: Path, config: Config) -> str:
    """The shape's name and the run's overrides, or the family and its sizes."""
    if config.model.name == INIT:
        settings = base_model.description(run)["config"]
        family = settings["model_type"]
        sizes = {name: settings.get(name) for name in shapes.FAMILIES[family].sizes}
        return f"{family} with " + ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)
    activation = {} if config.model.activation is None else {"activation": config.model.activation}
    changed = ", ".join(f"{name} {value}" for name, value in {**config.model.overrides, **activation}.items())
    return f"{config.model.name} with {changed}" if changed else config.model.name


def _facts(loaded: Loaded, config: Config) -> list[str]:
    """Lines for a run's model card, from its own records."""
    run, step = loaded.folder, loaded.step or 0
    val = [r for r in metrics.read(run) if r["kind"] == "val" and r["step"] <= step]
    done = "Linearized" if linear_windows(loaded.model) else "Trained"
    trained = f"{step * config.train.tokens_per_step:,} tokens ({step:,} steps), in sequences of {config.train.seq_len}"
    facts = [f"Architecture: {plain_in_markdown(_architecture(run, config))}", f"{done} on: {trained}"]
    if config.model.activation == sparse_relu.NAME:
        facts.append(
            f"Loads in transformers after `import sparse_kernels.transformers`, which knows its activation; {SOURCE}"
        )
    if val:
        facts.append(f"Validation loss: {val[-1]['loss']:.4f} nats per token at step {val[-1]['step']:,}")
    return facts


def _model_card(model: PreTrainedModel, name: str, facts: Sequence[str], *, merged: bool) -> str:
    """README.md of the export."""
    adapters, linear = adapters_of(model), bool(linear_windows(model))
    pruned = [*(x for _, x in sparse_layers(model)), *(x for _, x in masked_layers(model) if not x.unmasked)]
    pattern = " and ".join(dict.fromkeys(f"{x.n}:{x.m}" for x in pruned))
    sparse = bool(pattern) and not (merged and adapters)
    if not pattern:
        weights = "dense"
    elif sparse:
        weights = f"{pattern} sparse along the input features, stored dense with their zeros"
    else:
        weights = f"trained {pattern} sparse; low-rank adapters are merged, so the weights here are dense"
    tags = "[slope, sparse, pretrained]" if pattern else "[slope, pretrained]"
    lines = [
        "---",
        f"library_name: {'slope-cli' if linear else 'transformers'}",
        f"tags: {'[slope, linearized]' if linear else tags}",
        "---",
        f"# {plain_in_markdown(name)}",
        "",
        *(f"- {fact}" for fact in facts),
        f"- Linear weights: {weights}",
    ]
    causal = shapes.objective(model.config) == "causal"
    auto = "AutoModelForCausalLM" if causal else "AutoModelForPreTraining"
    code = [f"from transformers import {auto}, AutoTokenizer"]
    code += ["", f'model = {auto}.from_pretrained(".")', 'tokenizer = AutoTokenizer.from_pretrained(".")']
    if adapters and not merged:
        rank = next(iter(adapters.values())).rank
        lines.append(
            f"- Low-rank adapters, rank {rank}: the PEFT folder `{peft.FOLDER}/`; without them quality is lower"
        )
        code = ["from peft import PeftModel", *code, f'model = PeftModel.from_pretrained(model, "{peft.FOLDER}")']
    if linear:
        lines.append("- Attention: window softmax plus linear (slope linearize), maps in `linearize/`")
        lines.append(f"- Loads with: slope; {SOURCE}")
        lines.append("- With transformers' from_pretrained: softmax attention, without the maps")
        code = ["from pathlib import Path", "", "from slope_cli.checkpoint.load import load_model", ""]
        code += ['_, model, tokenizer, *_ = load_model(Path("."))']
    lines += ["", "```python", *code, "```"]
    if sparse and not linear:
        lines += ["", *_how_to_keep_sparse(causal)]
    return "\n".join(lines) + "\n"


def _how_to_keep_sparse(causal: bool) -> list[str]:
    """What a model card says of training a sparse model further."""
    own = "SFT --data chat.jsonl" if causal else "TASK"
    return [
        "Plain fine-tuning fills the zeros, and makes the model dense. What keeps them: an adapter (PEFT's LoRA) on",
        f"frozen weights; `slope finetune FOLDER {own}`; in transformers' Trainer",
        f"`sparse_kernels.trainer.SparsityCallback(model)`; {SOURCE}.",
    ]

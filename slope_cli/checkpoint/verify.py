"""`slope check`: is everything in a run's folder what was written there?"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.data.dataset import open_dataset
from slope_cli.errors import SlopeError
from slope_cli.report import metrics
from sparse_kernels import masked_layers, sparse_layers
from sparse_kernels.masks import is_nm

T = TypeVar("T")


def check(run: Path) -> dict[str, Any]:
    """Verify a run: config, log, checkpoints and base, its data where they are here, and load the newest sound one.

    Returns:
        `lines`, one for each thing looked at, and `faults`, those of them that are wrong.

    Raises:
        UsageError: not the folder of a run.
    """
    run_folder.require_run(run)
    lines: list[str] = []
    faults: list[str] = []

    def look(what: str, verify: Callable[[], T]) -> T | None:
        try:
            result = verify()
        except (SlopeError, ValueError) as error:
            lines.append(f"{what}: FAULT: {error}")
            faults.append(f"{what}: {error}")
            return None
        lines.append(f"{what}: sound")
        return result

    config = look(run_folder.CONFIG, lambda: run_folder.open_config(run))
    look(metrics.JSONL, lambda: metrics.read(run))
    folders = store.folders(run)
    saved = [(folder, look(folder.name, partial(store.verify, folder))) for folder in folders]
    newest = next((store.Checkpoint(folder, manifest, []) for folder, manifest in saved if manifest), None)
    manifest = newest and newest.manifest
    if manifest and "base" in manifest and not look(store.BASE, partial(store.verify_base, run, manifest)):
        newest = None
    folder = run_folder.data_folder(config, run) if config else run / "data"
    if folder.is_dir():
        look("data", lambda: _check_data(folder, manifest))
    if folders:
        look("model and tokenizer", lambda: _load(run, newest))
    return {"run": str(run), "lines": lines, "faults": faults}


def _check_data(folder: Path, manifest: dict[str, Any] | None) -> None:
    """Every byte of a data set, and that it is the one of a checkpoint."""
    dataset = open_dataset(folder)
    if manifest and dataset.fingerprint != manifest["data"]:
        raise SlopeError(f"{folder} holds other data than the run was trained on")


def _load(run: Path, checkpoint: store.Checkpoint | None) -> None:
    """Load config, newest sound checkpoint and tokenizer; check the pattern of every sparse and masked layer.

    checkpoint: that one, if it and its base are sound, so that nothing is hashed twice.
    """
    model = load_model(run, checkpoint=checkpoint).model
    for name, masked in masked_layers(model):
        if not (masked.unmasked or is_nm(masked.mask, masked.n, masked.m)):
            raise SlopeError(f"{name}: the stored mask is not exactly {masked.n}:{masked.m}")
    for name, layer in sparse_layers(model):
        try:
            layer.validate()
        except ValueError as error:
            raise SlopeError(f"{name}: {error}") from None

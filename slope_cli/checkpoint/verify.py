"""`slope check`: is everything in a run's folder what was written there?"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.data.dataset import open_dataset
from slope_cli.errors import SlopeError
from slope_cli.report import metrics, warned
from slope_cli.train.starts import STARTS
from slope_cli.utils import jsonl
from slope_cli.utils.environment import ENVIRONMENT
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

    def look(what: str, verify: Callable[[], T], folder: Path | None = None) -> T | None:
        try:
            result = verify()
        except (SlopeError, ValueError) as error:
            if folder and not folder.exists():  # a run that is training dropped it meanwhile
                lines.append(f"{what}: a newer checkpoint has replaced it")
                return None
            lines.append(f"{what}: FAULT: {error}")
            faults.append(f"{what}: {error}")
            return None
        lines.append(f"{what}: sound")
        return result

    config = look(run_folder.CONFIG, lambda: run_folder.verify_config(run))
    folders = store.folders(run)
    saved = [(folder, look(folder.name, partial(store.verify, folder), folder)) for folder in folders]
    newest = next((store.Checkpoint(folder, manifest, []) for folder, manifest in saved if manifest), None)
    manifest = newest and newest.manifest
    look(metrics.JSONL, partial(_check_metrics, run, manifest))
    for name in (ENVIRONMENT, STARTS, warned.WARNINGS):
        if (run / name).is_file():
            look(name, partial(_check_lines, run / name, manifest))
    if manifest and store.base_hash(manifest) and not look(store.BASE, partial(store.verify_base, run, manifest)):
        newest = None
    data = run_folder.data_folder(config, run) if config else run / "data"
    if data.is_dir():
        look("data", lambda: _check_data(data, manifest))
    if folders:
        look("model and tokenizer", lambda: _load(run, newest), newest and newest.folder)
    return {"run": str(run), "lines": lines, "faults": faults}


def _check_metrics(run: Path, manifest: dict[str, Any] | None) -> None:
    """Every line, and that the log is the one that a checkpoint follows."""
    if manifest:
        metrics.verify(run, manifest["step"], store.log_mark(manifest, metrics.JSONL))
    else:
        metrics.read(run)


def _check_lines(path: Path, manifest: dict[str, Any] | None) -> None:
    """Every line of a file about the run's starts, and that none is lost since a checkpoint was saved."""
    jsonl.read(path)
    mark = store.log_mark(manifest, path.name) if manifest else None
    if mark and not jsonl.extends(path, mark):
        raise SlopeError(f"{path}: lines are changed or lost")


def _check_data(folder: Path, manifest: dict[str, Any] | None) -> None:
    """Every byte of a data set, and that it is the one of a checkpoint."""
    dataset = open_dataset(folder)
    if manifest and dataset.fingerprint != manifest["data"]:
        raise SlopeError(f"{folder} holds other data than the run was trained on")


def _load(run: Path, checkpoint: store.Checkpoint | None) -> None:
    """Load config, newest sound checkpoint and tokenizer; check the pattern of every sparse and masked layer.

    checkpoint: that one, if it and its base are sound, so that nothing is hashed twice.
    """
    present = checkpoint if checkpoint and checkpoint.folder.exists() else None
    model = load_model(run, checkpoint=present).model
    for name, masked in masked_layers(model):
        if not (masked.unmasked or is_nm(masked.mask, masked.n, masked.m)):
            raise SlopeError(f"{name}: the stored mask is not exactly {masked.n}:{masked.m}")
    for name, layer in sparse_layers(model):
        try:
            layer.validate()
        except ValueError as error:
            raise SlopeError(f"{name}: {error}") from None

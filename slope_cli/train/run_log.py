"""The log of a run with the loggers that mirror it, as configured, and what a checkpoint's manifest says of it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slope_cli.checkpoint import run_folder, store
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.data.dataset import Dataset
from slope_cli.errors import SlopeError
from slope_cli.report import warned
from slope_cli.report.loggers import Logger, TensorBoard, Wandb
from slope_cli.report.metrics import JSONL, MetricsLog
from slope_cli.train import starts
from slope_cli.utils import jsonl
from slope_cli.utils.environment import ENVIRONMENT
from slope_cli.utils.files import file_sha256


def open_log(config: Config, run: Path, step: int, saved: Mapping[str, Any] | None) -> MetricsLog:
    """The log of a run that goes on after a step; a finished run's is mirrored no more.

    Args:
        saved: see `MetricsLog`.

    Raises:
        SlopeError: metrics.jsonl cannot be written, or wandb cannot start and this is the run's first start. A later
            one, which nobody may be watching, goes on without wandb.
    """
    mirrors: list[Logger] = []
    going_on = step < config.train.steps
    if going_on and config.log.tensorboard:
        mirrors.append(TensorBoard(run, step))
    if going_on and config.log.wandb:
        try:
            mirrors.append(Wandb(run, config.log.wandb_project, configs.container(config)))
        except SlopeError as error:
            if step == 0:
                raise
            warned.warn(f"{error}; training continues without it")
        else:
            print(f"wandb: {mirrors[-1].place}", file=sys.stderr)
    return MetricsLog(run, step, saved=saved, mirrors=mirrors)


def manifest_entries(config: Config, run: Path, dataset: Dataset, log: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says of a run's data and other files.

    Args:
        log: what `MetricsLog.sync` has returned.
    """
    marks = jsonl.marks(run / ENVIRONMENT, run / starts.STARTS, run / warned.WARNINGS)
    entries = {"data": dataset.fingerprint, **run_folder.manifest_metadata(config, run), "logs": {JSONL: log} | marks}
    if config.learns_from_teacher:
        entries["teacher"] = file_sha256(run / store.BASE / store.MANIFEST)
    return entries

"""The data set of a run, opened by all of its processes: each checks its share, and copies are made once a node."""

from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path

from slope_cli.checkpoint import run_folder
from slope_cli.config import schema
from slope_cli.config.schema import Config
from slope_cli.data.dataset import (
    MANIFEST,
    VERIFIED,
    Dataset,
    open_dataset,
    remember_verified,
    verified_before,
)
from slope_cli.data.local_copy import stage, staged
from slope_cli.data.prepare import prepare
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.signals import StopFlag
from slope_cli.report import warned


def open_run_data(config: Config, run: Path, group: Group, stop: StopFlag | None = None) -> Dataset:
    """The data set of a run; the embedded text is tokenized into the run's folder first.

    Raises:
        Stopped: `stop` was set meanwhile.
        UsageError: it is not a data set.
        SlopeError: it is unfinished or damaged.
    """
    folder, memory = run_folder.data_folder(config, run), run / VERIFIED
    check = partial(stop.check, folder) if stop else lambda: None
    group.first(lambda: _tokenize_embedded(config, folder, stop))
    opened = partial(open_dataset, folder, config.data.verify, check=check, known=verified_before(memory))
    dataset = group.agreed(lambda: opened(share=(group.ranks.rank, group.ranks.world)))
    checked = group.gather(dataset.verified)
    group.first(lambda: remember_verified(memory, checked) if run.is_dir() else None)
    return _on_this_node(config, dataset, group, check)


def _tokenize_embedded(config: Config, folder: Path, stop: StopFlag | None) -> None:
    if config.data.path == schema.EMBEDDED and not (folder / MANIFEST).exists():
        with resources.as_file(resources.files("slope_cli") / "assets" / "austen.jsonl.xz") as text:
            prepare([str(text)], folder, val_fraction=0.05, workers=1, progress=False, stop=stop)


def _on_this_node(config: Config, dataset: Dataset, group: Group, check: Callable[[], None]) -> Dataset:
    """The data set with its files on this node's own disk, if the configuration says so."""
    if config.data.local_copy is None:
        return dataset
    directory = Path(config.data.local_copy)
    group.agreed(lambda: stage(dataset, directory, warned.warn, check) if group.ranks.local_rank == 0 else None)
    return staged(dataset, directory)

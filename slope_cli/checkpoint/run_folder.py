"""The folder of a run: what is in it, and who may use it.

RUN/config.yaml          the resolved configuration
RUN/environment.jsonl    a line for each start: versions, source, machine
RUN/starts.jsonl         what each start achieved
RUN/warnings.jsonl       what it has warned of, if of anything
RUN/verified.json        the token files that were hashed
RUN/metrics.jsonl        every number of the run; tensorboard/ has them too
RUN/wandb.id             of a run that is mirrored to Weights & Biases
RUN/checkpoints/step-*   see slope_cli.checkpoint.store
RUN/tokenizer/           for generate and export
RUN/base.json, base/     the model that is linearized, in a run that does so; checkpoints hold only what it trains.
                         In a run that learns from a teacher, the teacher
RUN/transfer/            of attention transfer by ranges of layers, until it is done: what each range has learned, and
                         the hidden states between two of them
RUN/data/                the embedded text as tokens, in a run that trains on it
RUN/loss.png, loss.svg   drawn at the end
RUN/replaced/            the run that was there before, until this one has a checkpoint; see checkpoint/replaced.py
"""

import contextlib
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from slope_cli.checkpoint import replaced, store
from slope_cli.config import configs, schema
from slope_cli.config.schema import Config
from slope_cli.data.dataset import VERIFIED
from slope_cli.distributed.signals import Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.report import metrics
from slope_cli.utils import files
from slope_cli.utils.environment import source_version

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
TRANSFER = "transfer"
OWN = re.compile(
    r"config\.yaml|(environment|metrics|starts|warnings)\.jsonl|verified\.json|tensorboard|wandb\.id|checkpoints|tokenizer"
    r"|base\.json|base|transfer|data|loss\.(png|svg)|\.lock(-.*)?|\..*\.tmp|\.tmp-.*"
)
"""The names of what a run writes in its folder; other files and folders are the user's, or of other commands."""
SEAL = "# sha256 of the lines above: "
Existing = Literal["resume", "refuse", "replace"]
"""What a start does with a run that is in its folder."""


@contextlib.contextmanager
def claimed(run: Path, config: Config, existing: Existing, begun: Callable[[], bool]) -> Iterator[Config]:
    """Hold the folder of a new run, or of this very run, for this process.

    What fails before a step is finished leaves the folder as it was: absent, empty, or with the run that was there.
    What others have written to it meanwhile stays.

    Args:
        begun: whether this start has finished a step.

    Yields:
        The configuration, with the earlier lengths of a run that is or was extended.

    Raises:
        UsageError: it holds something else, a run of another configuration to resume, any run to `refuse`, cannot be
            written, or another process holds it.
    """

    def may_hold(path: Path) -> bool:
        known = path.name in (f".{CONFIG}.tmp", store.REPLACED) or path.suffix in replaced.LOG_ENDINGS
        return known or is_run(run)

    with contextlib.ExitStack() as held:
        made = list(itertools.takewhile(lambda folder: not folder.exists(), (run, *run.parents)))
        had_lock, replaces = (run / files.LOCK).exists(), existing == "replace" and is_run(run)
        if replaces:
            # To the end: a process that waits for it would take the moved folder for the run.
            held.enter_context(files.held_folder(run))
            _require_apart(run, config)
            replaced.move_away(run)
            there = run / store.REPLACED
            print(f"{there}: the run that was in {run}, until the new one has a checkpoint", file=sys.stderr)
        held.enter_context(files.claimed_folder(run, "run", may_hold))
        replaced.finish(run)
        before = _Before(run, had_lock=had_lock)
        try:
            yield _write_or_check_config(run, config, existing)
        except Exception as error:
            with contextlib.suppress(OSError):  # why the start failed matters more
                if begun() or isinstance(error, Stopped):
                    replaced.settle(run)
                elif replaces:
                    replaced.put_back(run, OWN)
                    print(f"{run}: holds the run again that was there before", file=sys.stderr)
                else:
                    before.restore()
                    for folder in made:
                        folder.rmdir()
            raise
        replaced.settle(run)


class _Before:
    """What a folder, which this process holds, was before a start."""

    def __init__(self, run: Path, *, had_lock: bool) -> None:
        self._run = run
        self._names = {path.name for path in run.iterdir()} - (set() if had_lock else {files.LOCK})
        self._logs = {path: path.stat().st_size for path in run.glob("*.jsonl") if path.is_file()}
        written = (run / CONFIG, run / VERIFIED)
        self._contents = {path: path.read_bytes() for path in written if path.is_file()}

    def restore(self) -> None:
        """Remove what a run has written since then, and bring back what was."""
        for path in self._run.iterdir():
            if path.name not in self._names and OWN.fullmatch(path.name):
                files.remove(path)
        for path, content in self._contents.items():
            if path.read_bytes() != content:
                with files.atomic_file(path) as file:
                    file.write(content)
        for path, size in self._logs.items():
            if path.stat().st_size > size:
                os.truncate(path, size)


def _require_apart(run: Path, config: Config) -> None:
    """UsageError if a new run needs something of the folder of the run that it replaces."""
    needed = {"model.init": config.model.init, "data.path": config.data.path, "distill.teacher": config.distill.teacher}
    for key, path in needed.items():
        if path and place(path)[0].resolve().is_relative_to(run.resolve()):
            raise UsageError(f"{key}={path}: is in the run that --overwrite replaces; choose another --out")


def _write_or_check_config(run: Path, config: Config, existing: Existing) -> Config:
    """Write the configuration of a new run, or compare it with that of the existing one, whose lengths it gets."""
    if is_run(run):
        if existing == "refuse":
            raise UsageError(f"{run} holds a run already; choose another --out, or leave out --new to resume it")
        saved = configs.load_saved(run / CONFIG)
        # Before its first step a run may still change: a start that failed on a wrong size must not bind the next.
        if begun := _has_begun(run):
            config = configs.extended(config, saved, store.newest_step(run))
        shorter = begun and config.train.steps < saved.train.steps
        if shorter:
            train = replace(config.train, steps=saved.train.steps, extended=saved.train.extended)
            config = replace(config, train=train)
        changed = configs.differences(configs.lengthened(saved, config) if begun else saved, config)
        if shorter:
            also = f"; it has another config, too ({'; '.join(changed)})" if changed else ""
            steps = f"train.steps={saved.train.steps}"
            raise UsageError(
                f"{run} is a run of {steps}, which does not become shorter: give {steps}, or another --out{also}"
            )
        if changed and begun:
            choice = "choose another --out, or --overwrite it"
            raise UsageError(f"{run} holds a run of another config ({'; '.join(changed)}); {choice}")
        if saved.train.micro_batch != config.train.micro_batch:
            sizes = f"{saved.train.micro_batch} -> {config.train.micro_batch}"
            print(f"train.micro_batch: {sizes}; from here on the results differ by rounding", file=sys.stderr)
        if begun and (free := configs.free_differences(saved, config)):
            print(f"changed since the last start: {'; '.join(free)}", file=sys.stderr)
        if not changed:
            return config
    write_config(run, config)
    return config


def _has_begun(run: Path) -> bool:
    """Whether a run has finished a step."""
    logged = metrics.read(run) if (run / metrics.JSONL).is_file() else []
    return bool(saved_steps(run)) or any(record["kind"] in metrics.STEPS for record in logged)


def saved_steps(run: Path) -> int:
    """The saved steps of a run: those of its newest checkpoint, or of all ranges of layers before there is one."""
    return store.newest_step(run) or sum(store.newest_step(folder) for folder in (run / TRANSFER).glob("*"))


def write_config(run: Path, config: Config) -> None:
    """Write RUN/config.yaml unless it is the same; keys that may change may differ from those of an earlier start."""
    content, path = _sealed(configs.dump(config)), run / CONFIG
    if not path.is_file() or path.read_bytes() != content:
        with files.atomic_file(path) as file:
            file.write(content)


def _sealed(text: str) -> bytes:
    """A configuration with the hash of its lines as a last line, a comment."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def verify_config(run: Path) -> Config:
    """The configuration of a run, if RUN/config.yaml is what was written; earlier versions wrote no hash to tell.

    Raises:
        UsageError: no configuration.
        SlopeError: another one than was written.
    """
    config, content = open_config(run), (run / CONFIG).read_bytes()
    text, _, last = content.decode().rstrip("\n").rpartition("\n")
    if last.startswith("#") and _sealed(f"{text}\n") != content:
        advice = f"if you edited it, run `slope pretrain {run / CONFIG} --out {run}`, which writes it anew"
        raise SlopeError(f"{run / CONFIG}: is not what was written, its checksum does not fit; {advice}")
    return config


def open_config(run: Path) -> Config:
    """The configuration of an existing run; UsageError if the folder holds none."""
    require_run(run)
    return configs.load_saved(run / CONFIG)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / CONFIG).is_file()


def require_run(run: Path) -> None:
    """UsageError if a folder holds no run."""
    if not is_run(run):
        raise UsageError(f"{run}: is not the folder of a run (no {CONFIG})")


def place(text: str) -> tuple[Path, int | None]:
    """The folder that is named, and of RUN@STEP the step."""
    text = os.path.expanduser(text)
    name, _, step = text.rpartition("@")
    if name and step.isascii() and step.isdecimal() and not os.path.lexists(text):
        return Path(name), int(step)
    return Path(text), None


def data_folder(config: Config, run: Path) -> Path:
    """Where the tokens of a run lie: the embedded text's inside its own folder."""
    return run / "data" if config.data.path == schema.EMBEDDED else Path(config.data.path).expanduser()


def manifest_metadata(config: Config, run: Path) -> dict[str, Any]:
    """The entries of a checkpoint's manifest about the run's other files and the program that saved it."""
    paths = sorted(path for path in (run / TOKENIZER).iterdir() if path.is_file())
    tokenizer = {path.name: files.file_sha256(path) for path in paths}
    return {"config": configs.fixed(config), "tokenizer": tokenizer, "source": source_version()}


def require_same_config(config: Config, run: Path, manifest: Mapping[str, Any]) -> None:
    """SlopeError naming the keys in which a configuration is not the one that a checkpoint was saved under."""
    then = configs.from_fixed(manifest["config"], f"{run}: checkpoint of step {manifest['step']}")
    if changed := configs.differences(configs.lengthened(then, config), config):
        raise SlopeError(
            f"{run / CONFIG} was altered after step {manifest['step']} ({'; '.join(changed)}); set it back"
        )


def altered_tokenizer_files(run: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The tokenizer's files that are missing or not those that a checkpoint was saved beside."""
    saved = {run / TOKENIZER / name: sha256 for name, sha256 in manifest["tokenizer"].items()}
    return [path for path, sha256 in saved.items() if not path.is_file() or files.file_sha256(path) != sha256]

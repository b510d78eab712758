"""The metrics log of a run, metrics.jsonl; what mirrors it is in slope_cli.report.loggers.

Each line has a checksum, and each checkpoint's manifest the length and hash of the log that it follows: so lines that
were changed are noticed, and lines that were lost.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slope_cli.errors import SlopeError
from slope_cli.report import warned
from slope_cli.report.loggers import Logger
from slope_cli.utils import files, jsonl

JSONL = "metrics.jsonl"
STEPS = ("train", "transfer")
"""The kinds of records written once per step: of training, with a loss in nats; of attention transfer, with the mean
squared error of a layer's output."""
INIT = "init"
"""The kind of the record of the model that a run begins with; see `slope_cli.train.init.Origin`."""
CLOCK = ("tokens_per_s", "mfu_dense_equivalent", "mfu_real")
"""What records of steps hold of the clock; those of the kind "time" hold nothing else."""
_NEEDED = {"train": "loss", "transfer": "mse", "val": "loss", "teacher": "loss", "swapped": "loss", "sample": "text"}
"""The key that every record of a kind has."""


def read(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line that a kill cut short is left out.

    Raises:
        SlopeError: there is no log, or a line is damaged.
    """
    path = run / JSONL
    if not path.is_file():
        raise SlopeError(f"{run} holds no {JSONL}: not the folder of a run")
    return jsonl.read(path, _is_sound)


def beginning(run: Path) -> dict[str, Any] | None:
    """The record of the model that a run began with; None if it began with new weights, or in an earlier version.

    Raises:
        SlopeError: the log cannot be read.
    """
    lines = jsonl.lines(run / JSONL, _is_sound) if (run / JSONL).is_file() else ()
    first = itertools.takewhile(lambda record: record["step"] == 1, (record for record, _ in lines if record))
    return next((record for record in first if record["kind"] == INIT), None)


def peak_memory(records: Iterable[Mapping[str, Any]]) -> int | None:
    """The most bytes that any rank's GPU had allocated during a run; None without a GPU."""
    # Validations note it; in version 0.1 every step did.
    return max((record["peak_memory"] for record in records if "peak_memory" in record), default=None)


def without_clock(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without what depends on the clock: those of equal runs are equal."""
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records if record["kind"] != "time"]


def require(run: Path, records: Iterable[Mapping[str, Any]], kinds: Collection[str], *keys: str) -> None:
    """SlopeError if a record of one of these kinds lacks a key, or its number, or its numbers by name."""
    for record in records:
        for key in keys if record["kind"] in kinds else ():
            if not isinstance(record.get(key), int | float | dict):
                raise SlopeError(f"{run / JSONL}: the {record['kind']} record of step {record['step']} has no {key}")


def verify(run: Path, step: int, saved: Mapping[str, Any] | None) -> None:
    """Verify the log that a checkpoint of a step follows.

    Args:
        saved: what `MetricsLog.sync` returned then; None for a checkpoint of an earlier version.

    Raises:
        SlopeError: naming the lines that are damaged, and the steps whose records are lost.
    """
    read(run)
    if lost := _Kept(run / JSONL, step, saved).lost:
        raise SlopeError(lost)


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Whether a record has a kind, a step and what its kind must have."""
    kind, step = record.get("kind"), record.get("step")
    if not isinstance(kind, str) or type(step) is not int or step < 1:
        return False
    needed = _NEEDED.get(kind)
    return needed is None or isinstance(record.get(needed), str if needed == "text" else int | float)


class _Kept:
    """What a run that goes on after a step keeps of its log.

    Attributes:
        content: the bytes.
        lost: a line about what is missing or damaged; empty if nothing is.
    """

    def __init__(self, path: Path, step: int, saved: Mapping[str, Any] | None) -> None:
        self.lost = ""
        if saved is not None and jsonl.extends(path, saved):
            with path.open("rb") as file:
                self.content = file.read(saved["bytes"])
            return
        lines = list(jsonl.lines(path, _is_sound)) if path.is_file() else []
        sound = [(record, line) for record, line in lines if record is not None and record["step"] <= step]
        self.content = b"".join(line for _, line in sound)
        present = {record["step"] for record, _ in sound if record["kind"] in STEPS}
        missing = [number for number in range(1, step + 1) if number not in present]
        damaged = len(lines) - sum(record is not None for record, _ in lines)
        if saved is not None or missing or damaged:
            what = [f"{damaged} of its lines are damaged"] if damaged else []
            what += [f"no record is left of {_ranges(missing)}"] if missing else []
            what = what or ["records other than those of steps are changed or lost"]
            self.lost = f"{path}: is not what it was when step {step} was saved: {', '.join(what)}"


def _ranges(steps: list[int]) -> str:
    """Steps in words: "steps 3-5, 9"."""
    groups = [[s for _, s in group] for _, group in itertools.groupby(enumerate(steps), lambda pair: pair[1] - pair[0])]
    return "steps " + ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


def _kinds_of_last_step(content: bytes, step: int) -> frozenset[str]:
    """The kinds of a sound log's last records, those of `step`."""
    kinds, end = set(), len(content)
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        record = json.loads(content[start:end])
        if record["step"] != step:
            break
        kinds.add(record["kind"])
        end = start
    return frozenset(kinds)


class Log:
    """A log that nobody sees, as on ranks other than 0.

    Attributes:
        kinds: of the records of the step that a resumed run goes on after.
    """

    kinds: frozenset[str] = frozenset()

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Record `values` of a step, counted from 1, and return the record."""
        return {"kind": kind, "step": step, **values}

    def sync(self) -> dict[str, Any]:
        """Flush the log to the disk, so that no checkpoint is newer than its log; its length and hash."""
        return {}

    def close(self) -> None:
        """Write no more."""


class MetricsLog(Log):
    """Appends records to RUN/metrics.jsonl, a line each, and passes them on to loggers that mirror it.

    It first drops the records after `step`: a resumed run repeats the steps after its last checkpoint. If the log is
    damaged, what is lost is named in a warning, and the damaged file is kept under another name.

    Args:
        saved: what `sync` returned when the checkpoint of `step` was saved.
        mirrors: a failure of one of these only ends it.
    """

    def __init__(
        self, run: Path, step: int, *, saved: Mapping[str, Any] | None = None, mirrors: Iterable[Logger] = ()
    ) -> None:
        self.path, self._mirrors = run / JSONL, list(mirrors)
        content = self._resume(step, saved) if step else b""
        with self._writing():
            self._file = files.open_own(self.path)
            os.ftruncate(self._file, len(content))
        self._bytes, self._digest = len(content), hashlib.sha256(content)
        self.kinds = _kinds_of_last_step(content, step)

    def _resume(self, step: int, saved: Mapping[str, Any] | None) -> bytes:
        """The log up to a step, which the file then begins with."""
        kept = _Kept(self.path, step, saved)
        if kept.lost:
            warned.warn(kept.lost)
        if not (self.path.is_file() and self.path.read_bytes().startswith(kept.content)):
            with self._writing():
                if self.path.exists():
                    names = (self.path.with_name(f"damaged-{number}-{JSONL}") for number in itertools.count())
                    self.path.rename(next(path for path in names if not path.exists()))
                with files.atomic_file(self.path) as file:
                    file.write(kept.content)
        return kept.content

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """As `Log.write`.

        Raises:
            SlopeError: metrics.jsonl cannot be written.
        """
        record = super().write(kind, step, **values)
        line = jsonl.encode(record)
        with self._writing():
            jsonl.write(self._file, line)
        self._bytes += len(line)
        self._digest.update(line)
        for mirror in list(self._mirrors):
            try:
                mirror.write(kind, step, values)
            except Exception as error:  # whatever it is in another library, the run goes on
                self._mirrors.remove(mirror)
                warned.warn(f"{mirror.place} ends at step {step}: {error}")
        return record

    def sync(self) -> dict[str, Any]:
        with self._writing():
            os.fsync(self._file)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for mirror in self._mirrors:
            with contextlib.suppress(Exception):
                mirror.close()
        self._mirrors = []

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise files.write_error(self.path, error) from error

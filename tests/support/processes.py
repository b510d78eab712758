"""Runs in processes of their own that can be killed at any operation on the disk, and a disk that is full."""

import contextlib
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from slope_cli import cli
from slope_cli.checkpoint import store
from slope_cli.config.schema import Config
from slope_cli.errors import SlopeError
from slope_cli.train import loop

PRELOADED = [
    "slope_cli.train.loop",
    "sparse_kernels",
    "transformers.models.gpt2.modeling_gpt2",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "matplotlib.pyplot",
    "rich.console",
]
# A server that has imported everything but computed nothing: what it forks starts in a moment, and with no threads.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(PRELOADED)


def start(config: Config, run: Path, prepare_child: Callable[..., None] | None = None, *args: Any) -> BaseProcess:
    """Train in a new process, after `prepare_child(*args)` in it; what it prints is appended to RUN.log."""
    child = forkserver.Process(target=_child, args=(config, run, prepare_child, args))
    child.start()
    return child


def finish(child: BaseProcess) -> int:
    """Wait for the end of a process; its exit code, minus the signal's number if one killed it."""
    child.join(60)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def printed(run: Path) -> str:
    """What the processes of a run printed."""
    return run.with_suffix(".log").read_text()


def run_command(
    words: list[str],
    log: Path,
    variables: Mapping[str, str],
    prepare_child: Callable[..., None] | None = None,
    *args: Any,
) -> None:
    """The target of a child that runs the command line, after `prepare_child(*args)`; what it prints replaces `log`."""
    _begin(log, os.O_TRUNC)
    os.environ.update(variables)
    sys.argv = ["slope", *words]
    if prepare_child is not None:
        prepare_child(*args)
    try:
        cli.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)


def _begin(log: Path, flag: int) -> None:
    """In a child: print to a file, compute in one thread, and search for garbage only among what is new."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | flag)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    gc.freeze()


def _child(config: Config, run: Path, prepare_child: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    _begin(run.with_suffix(".log"), os.O_APPEND)
    if prepare_child is not None:
        prepare_child(*args)
    try:
        loop.pretrain(config, run)
    except SlopeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(error.exit_code)
    os._exit(0)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait up to a minute; TimeoutError if it does not come true."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def has_content(path: Path) -> bool:
    """Whether a file has been written to."""
    return path.is_file() and path.stat().st_size > 0


def stopped(process: subprocess.Popen[str]) -> str:
    """Send SIGTERM, and expect exit code 75; what the process has said on standard error."""
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    return str(err)


def die_in_save(step: int, operation: int) -> None:
    """Let this process kill itself before the n-th (from 1) operation on the disk while it saves the step."""
    save = store.save

    def armed(run: Path, at: int, *args: Any, **kwargs: Any) -> Path:
        if at == step:
            _die_at(operation)
        return save(run, at, *args, **kwargs)

    store.save = armed


def die_in_save_base(operation: int) -> None:
    """Let this process kill itself before the n-th operation on the disk while it writes a run's base, or end after."""
    save_base = store.save_base

    def armed(*args: Any) -> None:
        _die_at(operation)
        save_base(*args)
        os._exit(0)

    store.save_base = armed


def _die_at(operation: int) -> None:
    done = 0

    def dying(operate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return operate(*args, **kwargs)

        return wrapped

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "rmdir")):
        setattr(module, name, dying(getattr(module, name)))


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Within it no file can grow beyond `size` bytes: what a full disk is like, without one.

    Keep it around as little as can be: pytest's own report may go to a file, too.
    """
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)

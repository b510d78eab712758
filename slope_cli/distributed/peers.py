"""How several processes end: together, with one message and one exit code, and at once if one of them dies.

Rank 0 holds a connection to every other rank. A process that ends says so first; a connection that closes without a
word means that a process was killed, or its host is gone. This holds wherever the others are: in a collective whose
other side will never answer, in a save, in a kernel.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from slope_cli.distributed import launch
from slope_cli.distributed.launch import Ranks
from slope_cli.distributed.signals import STOPPED
from slope_cli.errors import SlopeError, UsageError

TOGETHER = 1.0
"""Seconds that a process waits before it ends with an error that, before they have met, all of them come to."""
GRACE = 5.0
"""Seconds in which other ranks may come to the same end by themselves, after one ended with an error."""
LAST_WORK = 600.0
"""Seconds that rank 0 waits for the others, and they for it, at the end of their work."""
SILENCE = 10, 5, 4
"""A host is given up that does not answer: seconds of silence before the first probe, between probes, and probes."""

_current: "Peers | None" = None


def leave(code: int, text: str) -> None:
    """End this process together with its peers, and show `text` if no other does; returns if it has none."""
    if _current is not None:
        _current.end(code, text)
    with contextlib.suppress(UsageError):
        if code and launch.ranks().world > 1:  # a launcher that ends the others for it would give them another code
            time.sleep(TOGETHER)


def listen() -> tuple[socket.socket, str]:
    """Rank 0's end: a listening socket, and what the others need to connect to it."""
    server = socket.create_server(("", 0), backlog=1024)
    return server, f"{server.getsockname()[1]} {os.urandom(16).hex()}"


def accept(ranks: Ranks, server: socket.socket, invitation: str, seconds: float) -> "Peers":
    """On rank 0: wait for the other ranks to connect; SlopeError names those that do not."""
    token, deadline = invitation.split()[1], time.monotonic() + seconds
    sockets: dict[int, socket.socket] = {}
    with server:
        while len(sockets) < ranks.world - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                said = json.loads(_line(connection))
                if said["token"] == token:
                    sockets[int(said["rank"])] = connection
            except TimeoutError:
                if time.monotonic() >= deadline:
                    missing = sorted(set(range(1, ranks.world)) - sockets.keys())
                    raise SlopeError(f"no connection from {names(ranks, missing)} within {seconds:.0f} s") from None
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a stranger
    return Peers(ranks, sockets)


def connect(ranks: Ranks, host: str, invitation: str, seconds: float) -> "Peers":
    """On any other rank: connect to rank 0."""
    port, token = invitation.split()
    try:
        connection = socket.create_connection((host, int(port)), timeout=seconds)
        connection.sendall(json.dumps({"token": token, "rank": ranks.rank}).encode() + b"\n")
    except OSError as error:
        raise SlopeError(f"{ranks.name}: cannot connect to {host}:{port}, where rank 0 is: {error}") from None
    return Peers(ranks, {0: connection})


def _line(connection: socket.socket) -> bytes:
    """One short line of a connection; OSError or ValueError for anything else."""
    line = b""
    while not line.endswith(b"\n"):
        if not (piece := connection.recv(1)) or len(line) > 200:
            raise ValueError("no line")
        line += piece
    return line


def names(ranks: Ranks, numbers: list[int]) -> str:
    """Ranks with their hosts where these are known, for a message."""
    hosts = ranks.hosts
    return ", ".join(f"rank {number}" + (f" on {hosts[number]}" if hosts else "") for number in numbers)


class Peers:
    """The connections of this process: of rank 0 to all others, of another rank to rank 0."""

    def __init__(self, ranks: Ranks, sockets: dict[int, socket.socket]) -> None:
        global _current
        self._ranks, self._sockets = ranks, sockets
        self._stream = sys.stderr  # what silences a library redirects it meanwhile
        self._said: dict[int, dict[str, Any]] = {}
        self._gone: set[int] = set()
        self._ending = False
        self._changed = threading.Condition()
        for connection in sockets.values():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), SILENCE, strict=True):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()
        _current = self

    # ------------------------------------------------------------------------------------------ what the others do

    def _watch(self) -> None:
        selector, pending = selectors.DefaultSelector(), dict.fromkeys(self._sockets, b"")
        for number, connection in self._sockets.items():
            selector.register(connection, selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select(timeout=0.2):
                number = key.data
                try:
                    piece = self._sockets[number].recv(65536)
                except OSError:
                    piece = b""
                pending[number] += piece
                with self._changed:
                    if b"\n" in pending[number]:
                        line, _, pending[number] = pending[number].partition(b"\n")
                        self._said[number] = json.loads(line) | {"at": time.monotonic()}
                    if not piece:
                        selector.unregister(key.fileobj)
                        self._gone.add(number)
                    self._changed.notify_all()
            self._end_if_others_failed()

    def _end_if_others_failed(self) -> None:
        """End this process, from the watching thread, if another one died, or failed and this one does not follow."""
        with self._changed:
            if self._ending:
                return
            lost, late = self._lost(), time.monotonic() - GRACE
            failed = [n for n, said in self._said.items() if said["code"] not in (0, STOPPED) and said["at"] < late]
            if not (lost or failed or self._gone):
                return
            self._ending = True
        if self._ranks.first:
            self._dismiss(self._died(lost) if lost else "", same=bool(lost))
        elif lost and self._ranks.rank == 1:  # which speaks for all
            self._say(self._died(lost))
        _exit(1)

    def _lost(self) -> list[int]:
        """The ranks that ended without a word."""
        return sorted(number for number in self._gone if number not in self._said)

    def _died(self, lost: list[int]) -> str:
        return f"error: {names(self._ranks, lost)} died; all processes end"

    # ------------------------------------------------------------------------------------------------ how this one ends

    def end(self, code: int, text: str) -> NoReturn:
        """End this process: with `code`, but a rank other than 0 that was stopped by a signal ends with 0.

        So rank 0's code is the launcher's, which takes the largest, and a code of failure is never hidden by it.

        Args:
            text: shown by one process of those that end with the same text; "" for nothing.
        """
        with self._changed:
            first_end, self._ending = not self._ending, True
        if not first_end:  # the watching thread ends this process
            time.sleep(60)
        if not self._ranks.first:
            self._send(0, {"code": code, "text": text})
            self._wait(lambda: 0 in self._said or 0 in self._gone, LAST_WORK)
            if self._lost():  # what failed here failed for want of rank 0
                text = self._died([0]) if self._ranks.rank == 1 else ""
                code = 1
            elif text:
                text = "" if self._said.get(0, {}).get("same") else _named(text, self._ranks.name)
            self._say(text)
            _exit(0 if code == STOPPED else code)
        failed = code not in (0, STOPPED)
        others = self._sockets.keys()
        self._wait(lambda: others <= self._said.keys() | self._gone, GRACE if failed else LAST_WORK)
        lost = self._lost()
        if lost:  # what failed here failed for want of them
            code, text = 1, self._died(lost)
        elif not failed and any(said["code"] not in (0, STOPPED) for said in self._said.values()):
            code, text = 1, ""
        self._dismiss(text, same=bool(lost))
        _exit(code)

    def _dismiss(self, text: str, *, same: bool = False) -> None:
        """Answer the others, who then end, and wait until they have; same: none of them shows a text of its own."""
        self._say(text)
        for number in self._sockets:
            self._send(number, {"same": same or self._said.get(number, {}).get("text") == text, "code": 0})
        self._wait(lambda: self._said.keys() <= self._gone, 30)
        if self._ranks.world > self._ranks.local_world:
            time.sleep(0.5)  # a launcher hears of the ends on other hosts later than this process does

    def _say(self, text: str) -> None:
        if text:
            print(text, file=self._stream, flush=True)

    def _send(self, number: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has died
            self._sockets[number].sendall(json.dumps(message).encode() + b"\n")

    def _wait(self, done: Any, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(done, seconds)


def _named(text: str, name: str) -> str:
    """A message with the name of the process whose it is."""
    return text.replace("error: ", f"error: {name}: ", 1) if text.startswith("error: ") else f"{name}: {text}"


def _exit(code: int) -> NoReturn:
    """End at once: destroying process groups, on the way of an error or with graphs alive, can hang or abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)

"""A rank's end of the pipe to its supervisor: events go up; requests to stop, and who belongs together, come down.

Lines of JSON, not pickles: what arrives from another process is data.

A rank may be asked by a signal as well as by its supervisor, and it makes no difference: both set the flag that the
ranks add up in the next step's sum, so that all of them stop after the same step, whoever was asked. Signals are taken
by a thread that waits for them, and are blocked everywhere else. They interrupt nothing, and wait while there is no
thread yet.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, Self

from train import events
from train.pulse import Pulse

STOP = b"stop"  # what the supervisor sends to a rank that shall save and stop
MARK = b"mark"  # a rank's question whether all that it sent is in the run's record
RECORDED = b"recorded"  # the answer

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # each asks to save and stop
ECHO = 0.1  # seconds in which a request may arrive twice: `timeout` signals its child, then the child's whole group


class Requests:
    """What was asked of this process by signals, while it is entered: the first asks to stop, the next, at once.

    Until `hold` is called there are no ranks that could save anything, and a signal raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._held = False
        self._last = -ECHO

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._on_signal) for number in REQUESTS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on signals are only noted."""
        self._held = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < ECHO:
            return
        self._last = now
        self.names.append(signal.Signals(number).name)
        if not self._held:
            raise KeyboardInterrupt


class Channel:
    """Used by all threads of a rank. Knows where it is: a failure can say in which phase of which step it was."""

    def __init__(self, connection: Connection, pulse: Pulse) -> None:
        self._connection, self.pulse = connection, pulse
        self._sending = threading.Lock()  # a line goes up whole, whichever thread it is from
        self._stop = False
        self._membership: dict[str, Any] | None = None
        self.where: tuple[str, int | None] = ("start", None)  # phase, steps committed

    def phase(self, name: str, step: int) -> None:
        self.where = (name, step)
        self.pulse.beat(name)

    def send(self, event: events.Event) -> None:
        self._send(events.line(event.record()).encode())

    def settle(self) -> None:
        """Return when the supervisor has recorded, on the disk, all that was sent.

        What is saved after that is never ahead of the record: a run that goes on from it has no step without its
        event. Raises OSError or EOFError where there is no supervisor any more, and nothing may be saved.
        """
        self._send(MARK)
        while True:
            while not self._connection.poll(ECHO):
                self.pulse.beat()  # the supervisor may be slow, or stopped for a while
            if (word := self._connection.recv_bytes()) == RECORDED:
                return
            self._take(word)

    def stop_requested(self) -> bool:
        self._hear()
        return self._stop

    def membership(self) -> dict[str, Any] | None:
        """The newest that the supervisor has sent."""
        self._hear()
        return self._membership

    def _hear(self) -> None:
        self.pulse.beat()  # whoever listens is alive: it is done in every slice of a wait for others
        while self._connection.poll():
            self._take(self._connection.recv_bytes())

    def heed_signals(self, rank: int) -> None:
        """From now on the first of `REQUESTS` asks this rank to stop, and the next one ends it. In the main thread."""
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)  # here and in every thread that is started from here
        for number in REQUESTS:
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=self._heed, args=(rank,), daemon=True, name="signals").start()

    def _heed(self, rank: int) -> None:
        number = signal.sigwait(REQUESTS)
        self._stop = True
        with contextlib.suppress(OSError):  # the supervisor has gone
            self.send(events.Asked(rank=rank, by=signal.Signals(number).name))
        time.sleep(ECHO)
        while signal.sigpending() & set(REQUESTS):
            signal.sigwait(REQUESTS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)  # the kernel ends the process, whatever it is stuck in
        while True:
            signal.pause()

    def _take(self, word: bytes) -> None:
        if word == STOP:
            self._stop = True
        elif word.startswith(b"{"):
            self._membership = json.loads(word)

    def _send(self, message: bytes) -> None:
        with self._sending:
            self._connection.send_bytes(message)

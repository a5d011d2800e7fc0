"""A rank's end of the pipe to its supervisor: events go up, a request to stop comes down.

Lines of JSON, not pickles: what arrives from another process is data.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

from train import events

STOP = b"stop"  # what the supervisor sends to a rank that shall save and stop


class Channel:
    """Also knows where the rank is, so that a failure can say in which phase of which step it happened."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stop = False
        self.where: tuple[str, int | None] = ("start", None)  # phase, steps committed

    def phase(self, name: str, step: int) -> None:
        self.where = (name, step)

    def send(self, event: events.Event) -> None:
        self._connection.send_bytes(events.line(event.record()).encode())

    def stop_requested(self) -> bool:
        while not self._stop and self._connection.poll():
            self._stop = self._connection.recv_bytes() == STOP
        return self._stop

"""Ranks on other nodes, as the supervisor on node 0 sees them.

Each other node has an agent (`train.agent`), which forks, watches and kills what it is told to. The two hold one
connection, on which both must know the run's token before anything is said. Messages are lines of JSON; what ranks say
passes through as it is. Both sides say something every second: whoever hears nothing for `GONE` seconds takes the
other for lost. Then the agent kills its ranks and the supervisor goes on without them, whichever way the cable was cut:
there is one supervisor, and nobody trains without it. A cut that is shorter than that only takes its time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from train import events, nodes
from train.channel import MARK
from train.checks import Refused
from train.processes import died_of
from train.slots import Spot

BEAT = 1.0  # seconds between signs of life
GONE = 15.0  # seconds without one, after which a node is lost
BLOCKED = 5.0  # seconds in which a newcomer must have shown its token
SETTLED = 5.0  # seconds in which a node must have ended the ranks that it was told to end
LONGEST = 64 << 20  # bytes of a message: a log takes 400 kB at most, the checksums of a million parameters 20 MB
NONSENSE = "it said what no node says"
TOKEN = "COLOSSUS_TOKEN"


@functools.cache
def kinds() -> dict[str, dict[str, Any]]:
    """Of all events, the keys and their types."""
    return {one.kind: {**get_type_hints(one), "kind": str} for one in events.Event.__subclasses__()}


def key() -> bytes:
    """What the nodes of this run know and others do not: a digest of COLOSSUS_TOKEN, where that is set."""
    return hashlib.sha256(os.environ.get(TOKEN, "").encode()).digest()


def _limit(connection: Connection, seconds: float) -> None:
    """How long a read or a write may be under way; blocking all the same, as `Connection` expects."""
    with socket.socket(fileno=os.dup(connection.fileno())) as cable:
        cable.setblocking(True)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            cable.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))


def fits(value: Any, kind: Any, deep: int = 9) -> bool:
    """Whether JSON gave this type, or an object with these keys, nested no deeper. Null: a number was not finite."""
    if isinstance(kind, dict):
        return fits(value, dict[str, Any]) and all(key in value and fits(value[key], kind[key]) for key in kind)
    of, inner = type(value) if kind is Any else get_origin(kind), get_args(kind) or (kind,)
    if of in (dict, list):
        parts = value.values() if type(value) is dict else value
        return type(value) is of and deep > 0 and all(fits(part, inner[-1], deep - 1) for part in parts)
    return kind is Any or type(value) in inner or (float in inner and type(value) in (int, type(None)))


class Link:
    """A node's end of the connection between two."""

    def __init__(self, connection: Connection, peer: str) -> None:
        self.peer = peer  # the other's address
        self._connection = connection
        self._heard = time.monotonic()
        self._broken = ""  # how
        self._sending = threading.Lock()
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    @classmethod
    def over(cls, cable: socket.socket, secret: bytes, calls: bool) -> Self:
        """Once both have shown that they know the token. Raises AuthenticationError, or OSError or EOFError."""
        with cable:
            peer, connection = cable.getpeername()[0], Connection(cable.detach())
        try:
            _limit(connection, BLOCKED)
            for turn in (answer_challenge, deliver_challenge) if calls else (deliver_challenge, answer_challenge):
                turn(connection, secret)
            _limit(connection, GONE)
        except BaseException:
            connection.close()
            raise
        return cls(connection, peer)

    @property
    def lost(self) -> str:
        """Why nothing is to be expected from the other side any more; '' while something is."""
        silent = time.monotonic() - self._heard
        if self._broken or silent < GONE or self._connection.poll():
            return self._broken
        return f"nothing heard for {silent:.0f} s"

    def sources(self) -> list[Any]:
        return [] if self._broken else [self._connection]

    def send(self, **message: Any) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(json.dumps(message).encode())
        except OSError as error:
            self._broken = self._broken or f"its connection broke ({error.strerror})"

    def _beat(self) -> None:
        """In a thread: its process may be busy, with the start of others or a slow disk."""
        while not self._broken:
            self.send()
            time.sleep(BEAT)

    def receive(self) -> Iterator[dict[str, Any]]:
        try:
            while not self._broken and self._connection.poll():
                message = dict(json.loads(self._connection.recv_bytes(LONGEST)))
                self._heard = time.monotonic()
                if message:
                    yield message
        except (OSError, EOFError) as error:
            self._broken = f"its connection broke ({str(error) or 'closed at the other end'})"
        except (RecursionError, TypeError, ValueError):
            self._broken = NONSENSE

    def part(self, **message: Any) -> None:
        """Say the last word, and close when the other side has: what is not read yet may be lost with a connection."""
        self.send(**message)
        until = time.monotonic() + SETTLED
        while not self._broken and time.monotonic() < until:
            for _ in self.receive():
                pass
            time.sleep(0.01)
        self.close()

    def close(self, why: str = "its connection was closed") -> None:
        self._broken = self._broken or why
        self._connection.close()


@dataclass(slots=True, eq=False)
class RemoteRank:
    """What `processes.Rank` is, on another node."""

    member: int
    slot: int
    named: bool
    there: There
    port: int = 0
    stands_by: bool = False
    left: bool = False
    fault: dict[str, Any] | None = None
    alive: bool = True
    killed: bool = False
    cause: str = ""
    said: list[bytes] = field(default_factory=list)
    silence: tuple[float, str] | None = None
    seen: str = ""  # its flight, when a rank of its node hung

    @property
    def spot(self) -> Spot:
        return self.there.index, self.slot

    def sources(self) -> list[Any]:
        return []  # its node's link

    def tell(self, message: bytes) -> None:
        self.there.link.send(to=self.member, word=message.decode())

    def words(self) -> Iterator[bytes]:
        while self.said:
            yield self.said.pop(0)

    def silent(self) -> tuple[float, str] | None:
        return self.silence if self.alive else None

    def flight(self) -> str:
        return self.seen or f"on node {self.there.index}"

    def died_of(self) -> str:
        return self.cause

    def dump(self) -> None:
        self.there.link.send(dump=self.member)

    def kill(self) -> None:
        self.there.link.send(kill=self.member)

    def end(self) -> None:
        """Returns when it has ended, or its node is not to be waited for."""
        self.kill()
        until = time.monotonic() + SETTLED
        while self.alive and time.monotonic() < until:
            self.there.hear()
            time.sleep(0.01)
        if self.alive:
            self.there.link.close()


@dataclass(slots=True)
class There:
    """Another node, where ranks can be forked."""

    index: int
    devices: int
    link: Link
    logs: Path
    ranks: dict[int, RemoteRank] = field(default_factory=dict)
    asked: str = ""  # by what it was asked to stop
    leaves: bool = False  # its ranks are to go at the end of a step

    @property
    def host(self) -> str:
        return self.link.peer

    def fork(self, slot: int, order: dict[str, Any]) -> RemoteRank:
        rank = RemoteRank(order["member"], slot, not order["joins"], self)
        self.ranks[rank.member] = rank
        self.link.send(fork=slot, order=order)
        return rank

    def hear(self) -> None:
        """Take in what the agent has said. One that says what no agent says is lost, and the run goes on."""
        try:
            for message in self.link.receive():
                self._take(message)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            self.link.close(NONSENSE)

    def brief(self, records: Iterable[dict[str, Any]]) -> None:
        """Let its ranks know which faults on order have struck. Of a node that has gone nothing is read."""
        for record in () if self.link.lost else records:
            if record["kind"] == "injected":
                self.link.send(record=record)

    def drop(self) -> None:
        """Take it for gone, and its ranks for dead; it does so, too."""
        for rank in self.ranks.values():
            rank.alive = False
            rank.cause = rank.cause or f"node {self.index} is lost: {self.link.lost}"
        self.link.close()

    def _take(self, message: dict[str, Any]) -> None:
        rank = self.ranks.get(message.get("from", -1))
        if "asked" in message:
            self.asked = str(message["asked"])
        elif rank is None:
            return
        elif "word" in message:
            if (word := message["word"].encode()) != MARK and not fits(said := json.loads(word), kinds()[said["kind"]]):
                raise ValueError
            rank.said.append(word)
        elif "port" in message:
            rank.port = int(message["port"])
        elif "silent" in message:
            rank.silence = float(message["silent"]), str(message["phase"])
            for one in self.ranks.values():
                if flight := message["flights"].get(str(one.member)):
                    one.seen = f"{flight} (node {self.index})"
        elif "exit_code" in message:
            rank.alive, rank.killed = False, message["exit_code"] < 0
            rank.cause = died_of(message["exit_code"])
            log = self.logs / f"rank-{rank.member}.log"
            if message["log"] and not log.exists():  # it is another folder there
                with contextlib.suppress(OSError):  # a full disk
                    log.write_text(message["log"])


def call(node: nodes.Node) -> Link | None:
    """The link to node 0; None while nobody answers there. Raises Refused where its token is another."""
    try:
        cable = socket.create_connection((node.host, node.port), timeout=BLOCKED)
    except OSError:
        return None
    try:
        return Link.over(cable, key(), calls=True)
    except AuthenticationError as error:
        why = f"node 0 at {node.host}:{node.port} has another token: set {TOKEN} to the same on all nodes"
        raise Refused("nodes", why) from error
    except (OSError, EOFError):
        return None

"""The nodes of a run, as node 0 has them: how they arrive, who is let in, how they go.

A node may take part if it shows the run's token, and if all that it would do is what node 0 does: settings, corpus,
faults on order. It may come at any time, and go: what that means for the ranks is the supervisor's affair.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from train import nodes
from train.checks import DONE, FAILED, REFUSED, STOPPED, Refused, require
from train.folder import differences
from train.processes import Here
from train.remote import BEAT, BLOCKED, TOKEN, Link, There, fits, key
from train.slots import Spot

PATIENCE = 600.0  # seconds in which the nodes of a run must find each other
GREETERS = 32  # strangers who are met at once: others wait outside, or whoever connects could use up all descriptors


class Lobby:
    """Where the agents of other nodes arrive. Threads see to it that nobody who has no token takes our time."""

    def __init__(self, node: nodes.Node, arrived: queue.Queue[tuple[Link, dict[str, Any]]]) -> None:
        self._arrived, self._key, self._socket = arrived, key(), nodes.listen(node, node.port)
        for _ in range(GREETERS):
            threading.Thread(target=self._open, daemon=True, name="lobby").start()

    def _open(self) -> None:
        while self._socket.fileno() >= 0:  # not closed
            try:
                cable, _ = self._socket.accept()
            except OSError:  # of the one who called, or too many open files here: others may come
                time.sleep(BEAT)
            else:
                self._greet(cable)

    def _greet(self, cable: socket.socket) -> None:
        with contextlib.suppress(Exception):  # whatever it meets with a stranger, its thread goes on to the next
            link = Link.over(cable, self._key, calls=False)
            until = time.monotonic() + BLOCKED
            while time.monotonic() < until and not link.lost:
                for hello in link.receive():
                    self._arrived.put((link, hello))
                    return
                time.sleep(0.01)
            link.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # on some systems a socket that listens is not connected
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Fleet:
    """The nodes of a run: this one, node 0, and those that have come."""

    def __init__(self, here: Here, most: int, hello: dict[str, Any]) -> None:
        """At most so many nodes. `hello`: what this one would say, and others must say too."""
        self.here, self.others = here, dict[int, There]()
        self.verdict: tuple[int, str] | None = None  # the run's exit code and why, for all nodes
        self._most, self._hello = most, hello
        self._arrived: queue.Queue[tuple[Link, dict[str, Any]]] = queue.Queue()
        self._lobby = None if here.node.alone else Lobby(here.node, self._arrived)
        self._turned_away = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Tell all how it ended."""
        codes = {Refused: REFUSED, KeyboardInterrupt: STOPPED}
        code, why = self.verdict or (codes.get(kind, FAILED) if kind else DONE, str(error or ""))
        for there in self.others.values():
            there.link.part(over=code, why=why or "node 0 says why" * (code == FAILED))
        if self._lobby is not None:
            self._lobby.close()

    def gather(self, least: int, say: Callable[[str], None]) -> None:
        """Wait until there are so many nodes. Raises Refused where one of them cannot take part, or does not come."""
        until = time.monotonic() + PATIENCE
        if self._lobby is not None and not os.environ.get(TOKEN):
            say(f"{TOKEN} is not set: whoever reaches port {self.here.node.port} of this machine can take part")
        while len(self.others) + 1 < least:
            missing = least - 1 - len(self.others)
            if not self.meet():
                require(not self._turned_away, "nodes", self._turned_away)
                require(time.monotonic() < until, "nodes", f"{missing} of {least} have not come in {PATIENCE:.0f} s")
                time.sleep(0.05)
            elif missing > 1:
                say(f"waiting for {missing - 1} more of {least} nodes")

    def at(self, index: int) -> Here | There:
        return self.others[index] if index else self.here

    def spots(self, spares: int) -> list[Spot]:
        """Where ranks can live: those that shall, node by node, and behind them those that are to stand by."""
        others = [there for _, there in sorted(self.others.items()) if not there.leaves]
        staying: list[Here | There] = [self.here, *others]
        ranks = [(node.index, slot) for node in staying for slot in range(node.devices)]
        return ranks + [(node.index, node.devices + spare) for node in staying for spare in range(spares)]

    @property
    def devices(self) -> int:
        """How many ranks shall live on them."""
        return self.here.devices + sum(there.devices for there in self.others.values() if not there.leaves)

    def sources(self) -> list[Any]:
        return [source for there in self.others.values() for source in there.link.sources()]

    def meet(self) -> list[There]:
        """Hear them all, and see who has come or gone: those nodes. The ranks of a node that has gone are dead."""
        changed = []
        for _ in range(self._arrived.qsize()):
            link, hello = self._arrived.get()
            if why := self._unfit(hello):
                self._turned_away = f"node {hello.get('node')} at {link.peer} cannot take part: {why}"
                link.part(over=REFUSED, why=self._turned_away)
                continue
            if hello["node"] in self.others:  # back before we notice that it was gone; or another one, which may wait
                list(link.receive())
                link.close() if link.lost else self._arrived.put((link, hello))
                continue
            there = There(hello["node"], hello["devices"], link, self.here.folder / "logs")
            self.others[there.index] = there
            changed.append(there)
        for there in list(self.others.values()):
            there.hear()
            if there.leaves and not any(rank.alive for rank in there.ranks.values()):
                there.link.part(over=STOPPED, why="")
                there.drop()
            if there.link.lost:
                there.drop()
                del self.others[there.index]
                changed.append(there)
        return changed

    def _unfit(self, hello: dict[str, Any]) -> str:
        most = self.here.config.batch.virtual_ranks  # which no node has more ranks than: it would have refused to
        fitting = fits(hello, {"node": int, "devices": int, "agrees": dict[str, Any]})
        if not fitting or not 0 < hello["node"] < self._most or not 0 < hello["devices"] <= most:
            return f"there are nodes 0 … {self._most - 1}, of 1 … {most} ranks"
        different = differences(self._hello["agrees"], hello["agrees"])
        return ", ".join(f"{key} is {here} on node 0, {there} there" for key, (here, there) in different.items())

    def can_spare(self, index: int, least: int) -> bool:
        """Whether a node may go: at least so many stay."""
        return sum(not there.leaves for there in self.others.values() if there.index != index) + 1 >= least

"""The parent of the ranks of a node that is not node 0: it does what the supervisor there says.

It prepares the data and holds a forkserver, as the supervisor does; it forks, tells, kills and reports, and decides
nothing. What its ranks say goes up the link and into `events-<node>.jsonl` here, with the faults on order that have
struck anywhere, which its ranks read. A node that has lost the supervisor ends its ranks at once, since others may be
doing their work by now, and calls again until somebody answers: then it takes part like a node that is new.
"""

from __future__ import annotations

import json
import time
from multiprocessing.connection import wait
from typing import Any

from train import events, folder
from train.channel import Requests
from train.checks import FAILED, STOPPED, seconds
from train.console import Console
from train.data.writing import Preparer
from train.fleet import PATIENCE
from train.processes import Here, Rank
from train.remote import Link, call

AGAIN = 0.5  # seconds between two calls
TAIL = 65_536  # bytes of a dead rank's log that are sent along


class Agent:
    def __init__(
        self,
        here: Here,
        run: folder.RunFolder,
        console: Console,
        preparer: Preparer | None,
        requests: Requests,
        hello: dict[str, Any],
    ) -> None:
        """`hello`: what node 0 compares with its own before it lets this node take part."""
        self._here, self._run, self._console = here, run, console
        self._preparer, self._requests, self._hello = preparer, requests, hello
        self._ranks: list[Rank] = []
        self._log = events.EventLog(run.events_path)
        limit = seconds(here.config.stop_after)
        self._deadline = None if limit is None else time.monotonic() + limit
        self._heeded = False  # what was asked of this process

    def run(self) -> int:
        """Take part until the run is over; returns its exit code."""
        where = f"node 0 at {self._here.host}:{self._here.node.port}"
        try:
            while True:
                self._console.say(f"node {self._here.index}: waiting for {where}")
                link = self._call()
                if link is None:
                    return STOPPED if self._requests.names else self._fail(f"{where} has not answered: is it running?")
                self._console.say(f"node {self._here.index}: does what {where} says")
                code = self._serve(link)
                if code is not None:
                    return code
                self._end_all()
                self._console.say(f"node {self._here.index}: lost {where} ({link.lost}); its ranks here are ended")
                link.close()
        finally:
            self._end_all()
            self._console.close()
            self._log.close()

    def _call(self) -> Link | None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not self._requests.names:
            if (link := call(self._here.node)) is not None:
                link.send(**self._hello)
                return link
            time.sleep(AGAIN)
        return None

    def _serve(self, link: Link) -> int | None:
        """Until the run is over; returns its exit code. None: node 0 is lost."""
        told: set[int] = set()  # members whose silence was reported
        while not link.lost:
            wait([*link.sources(), *(source for rank in self._ranks for source in rank.sources())], timeout=0.2)
            dead = [rank for rank in self._ranks if not rank.alive]
            for rank in self._ranks:
                for word in rank.words():
                    self._keep(word)
                    link.send(**{"from": rank.member, "word": word.decode()})
                if rank.member not in told and (found := rank.silent()):
                    told.add(rank.member)
                    flights = {one.member: one.flight() for one in self._ranks}
                    link.send(**{"from": rank.member, "silent": found[0], "phase": found[1], "flights": flights})
            for rank in dead:
                code = rank.process.exitcode or 0
                link.send(**{"from": rank.member, "exit_code": code, "log": self._tail(rank.member)})
                told.discard(rank.member)  # its number is another's when all start again
            self._ranks = [rank for rank in self._ranks if rank not in dead]
            for message in link.receive():
                if "over" in message:
                    link.close()
                    if message["why"]:
                        self._console.error(message["why"])
                    return int(message["over"])
                self._heed(message, link)
            if len(self._requests.names) > 1:
                self._console.say(f"stopped at once ({self._requests.names[1]})")
                return FAILED
            self._pass_on(link)
            if self._preparer is not None and (error := self._preparer.poll(self._console.event)):
                return self._fail(f"the data: {error}")
        return None

    def _heed(self, message: dict[str, Any], link: Link) -> None:
        if "fork" in message:
            rank = self._here.fork(message["fork"], message["order"])
            self._ranks.append(rank)
            link.send(**{"from": rank.member, "port": rank.port})
        elif "record" in message:
            self._log.append(message["record"])
        else:
            for rank in self._ranks:
                if rank.member == message.get("to"):
                    rank.tell(message["word"].encode())
                elif rank.member == message.get("dump"):
                    rank.dump()
                elif rank.member == message.get("kill"):
                    rank.kill()

    def _pass_on(self, link: Link) -> None:
        """What was asked of this node is the supervisor's to answer."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        if (self._requests.names or late) and not self._heeded:
            self._heeded = True
            config = self._here.config
            link.send(asked=self._requests.names[0] if self._requests.names else f"stop_after={config.stop_after}")

    def _keep(self, word: bytes) -> None:
        if word.startswith(b"{"):
            record = json.loads(word)
            self._log.append(record)
            if record["kind"] != "step":  # node 0 shows how it goes on
                self._console.event(record)

    def _tail(self, member: int) -> str:
        path = self._run.path / "logs" / f"rank-{member}.log"
        return path.read_bytes()[-TAIL:].decode(errors="replace") if path.exists() else ""

    def _fail(self, why: str) -> int:
        self._console.error(why)
        return FAILED

    def _end_all(self) -> None:
        for rank in self._ranks:
            rank.end()
        self._ranks = []

"""The exact sum of ranks on several hosts: inside each host first, so that a bucket crosses a cable once a host.

For each chunk of a bucket every host has one rank that collects it: its owner, or one of the host's ranks in turn. It
takes four all-to-alls, in which most pairs of ranks have nothing for each other:

    inside hosts     every subtree's chunk c to the host's collector of c, which adds up the host's maximal subtrees
    between hosts    … to c's owner, which finishes the tree
    between hosts    the sum of chunk c to its collector on each other host
    inside hosts     … to all ranks there

It is the canonical tree's sum, to the bit. With one subtree a host 2(H-1)/H of the gradient's bytes leave each of H
hosts, however many ranks it has. A bucket goes a step on whenever one behind it is sent: cables and hosts are busy at
the same time. Where there is one host, or each has one rank, the sum is the flat one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import chain

import torch
from torch import Tensor

from train.batch import Node, fold, maximal
from train.buckets import Started
from train.flat import Range, chunk
from train.ranks import Wait
from train.reduce import ExactReducer

Label = tuple[int, Node]  # of what travels: a chunk of a subtree's sum
Mail = dict[tuple[int, int], list[Label]]  # by sender and receiver
Steps = Generator[None, None, None]  # of a bucket on its way: all ranks take them in the same order
Swap = Generator[None, None, dict[Label, Tensor]]  # one of them, which comes to what has arrived


def collectors(hosts: Sequence[int]) -> list[list[int]]:
    """By rank, the chunks that it collects for its host: its own, and a share of those of other hosts' ranks."""
    ranks = {host: [rank for rank, at in enumerate(hosts) if at == host] for host in hosts}
    return [
        [c for c, home in enumerate(hosts) if rank == (c if home == host else ranks[host][c % len(ranks[host])])]
        for rank, host in enumerate(hosts)
    ]


class HostsFirstReducer(ExactReducer):
    """Bitwise the sum of `ExactReducer`, with fewer bytes between hosts."""

    def assign(self, hosted: Sequence[Sequence[int]]) -> None:
        super().assign(hosted)
        hosts, root, me = self.ranks.hosts, self._root, self.ranks.rank
        self._line: list[Steps] = []  # the oldest first
        self._flat_sum = not 1 < len(set(hosts)) < len(hosts)
        if self._flat_sum:
            return
        collected, pairs = collectors(hosts), [(r, q) for r in range(len(hosts)) for q in range(len(hosts))]
        complete = {h: maximal([v for r, own in enumerate(hosted) if hosts[r] == h for v in own], root) for h in hosts}
        self._collected = [(c, node) for c in collected[me] for node in complete[hosts[me]]]
        near = [(r, q) for r, q in pairs if hosts[r] == hosts[q]]
        far = [pair for pair in pairs if pair not in near]
        self._to_collectors = {(r, q): [(c, node) for c in collected[q] for node in self._subtrees[r]] for r, q in near}
        self._to_owners = {(r, q): [(q, node) for node in complete[hosts[r]]] for r, q in far if q in collected[r]}
        self._to_hosts = {(r, q): [(r, root)] for r, q in far if r in collected[q]}
        self._to_ranks = {(r, q): [(c, root) for c in collected[r]] for r, q in near}

    def _between(self, bucket: Range, sent: list[Tensor]) -> Started:
        return super()._between(bucket, sent) if self._flat_sum else self._begin(self._sum(bucket, sent))

    def _gather(self, target: Tensor, own: Tensor) -> Wait:
        if self._flat_sum:
            return super()._gather(target, own)
        a = int(target.storage_offset())
        return self._begin(self._hand_out((a, a + target.numel()), target, own))()

    def _begin(self, steps: Steps) -> Started:
        next(steps)

        def go_on() -> Wait:
            self._line.append(steps)
            self._go_on()
            return lambda: self._go_on(steps)

        return go_on

    def _go_on(self, end: Steps | None = None) -> None:
        """Each bucket on its way ends the step that it has begun, and begins the next; again until `end` is over."""
        self._line = [steps for steps in self._line if next(steps, "over") is None]
        if end in self._line:
            self._go_on(end)

    def _sum(self, bucket: Range, sent: list[Tensor]) -> Steps:
        rank, sizes = self.ranks.rank, self._sizes(bucket)
        subtrees = zip(self._subtrees[rank], sent, strict=True)
        have = {(c, node): part for node, value in subtrees for c, part in enumerate(value.split(sizes))}  # type: ignore[no-untyped-call]
        have = yield from self._swap(self._to_collectors, bucket, have, self.dtype)
        have = {(c, node): self._fold(c, node, have) for c, node in self._collected}
        have |= yield from self._swap(self._to_owners, bucket, have, self.dtype)
        own = self._fold(rank, self._root, have)
        self._finish_chunk(own.to(self.flat.device), chunk(bucket, rank, self.ranks.world)[0])
        if not self._sharded:
            yield from self._hand_out(bucket, self._last.tensor[slice(*bucket)], own)

    def _hand_out(self, bucket: Range, target: Tensor, own: Tensor) -> Steps:
        """Bring every rank's chunk into `target` on all of them."""
        have = {(self.ranks.rank, self._root): own.to(self.ranks.wire)}
        have |= yield from self._swap(self._to_hosts, bucket, have, own.dtype)
        have = yield from self._swap(self._to_ranks, bucket, have, own.dtype)
        for part, (_, value) in zip(target.split(self._sizes(bucket)), sorted(have.items()), strict=True):  # type: ignore[no-untyped-call]
            part.copy_(value)

    def _fold(self, c: int, node: Node, have: dict[Label, Tensor]) -> Tensor:
        return fold(node, lambda part: have.get((c, part)), Tensor.add_)

    def _sizes(self, bucket: Range) -> list[int]:
        return [b - a for a, b in (chunk(bucket, rank, self.ranks.world) for rank in range(self.ranks.world))]

    def _swap(self, mail: Mail, bucket: Range, have: dict[Label, Tensor], dtype: torch.dtype) -> Swap:
        """Start to send what is had, give way, wait: what has come here."""
        ranks, sizes, every = self.ranks, self._sizes(bucket), range(self.ranks.world)
        given = [mail.get((ranks.rank, other), []) for other in every]
        taken = [mail.get((other, ranks.rank), []) for other in every]
        parts, labels = [have[label] for label in chain(*given)], list(chain(*taken))
        sent = torch.cat(parts).to(ranks.wire) if parts else torch.empty(0, dtype=dtype, device=ranks.wire)
        received = torch.empty(sum(sizes[c] for c, _ in labels), dtype=dtype, device=ranks.wire)
        to_each, from_each = ([sum(sizes[c] for c, _ in own) for own in way] for way in (given, taken))
        work = ranks.exchange(received, sent, from_each, to_each)
        yield
        ranks.wait(work, f"a part of the exchange of elements {bucket[0]:,} to {bucket[1]:,}")
        return dict(zip(labels, received.split([sizes[c] for c, _ in labels]), strict=True))  # type: ignore[no-untyped-call]

"""Checksums of what a step was computed from, taken while it is computed.

They are sums of integers modulo 2^64, so they come out equal however the work is cut among ranks, and they cost one
pass over memory. By them two runs are compared, and a step that is computed again is proved.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from train.flat import Flat

PARAMETERS, GRADIENT = 0, 1  # what `state` has sums of: the parameters before the step, and its gradient


def word(checksum: int) -> str:
    """As 16 hexadecimal digits: how a checksum stands in the record."""
    return f"{checksum & (2**64 - 1):016x}"


class Evidence:
    """This rank's part of a step's checksums; the ranks' parts are to be added."""

    def __init__(self, flat: Flat, by_parameter: bool = False) -> None:
        self._flat, self._by_parameter = flat, by_parameter
        size = len(flat.slots) if by_parameter else 1
        self.state = torch.zeros(2, size, dtype=torch.int64, device=flat.device)
        self._leaves: dict[int, Tensor] = {}
        self._none = torch.zeros((), dtype=torch.int64, device=flat.device)

    def begin(self, kept: Collection[int]) -> None:
        """A step, or the rest of one of which these virtual ranks' gradients are there already."""
        self.state.zero_()
        self._leaves = {v: checksum for v, checksum in self._leaves.items() if v in kept}

    def of_state(self, which: int, tensor: Tensor, start: int) -> None:
        """Count a stretch of the parameters or of the summed gradient, which lies from `start` on."""
        checksums = self._flat.checksum(tensor.detach(), start)
        if self._by_parameter:
            self._flat.by_parameter(checksums, start, self.state[which])
        else:
            self.state[which] += checksums.sum()

    def of_leaf(self, virtual_rank: int, tensor: Tensor, start: int) -> None:
        """Count a stretch of a virtual rank's own gradient."""
        self._leaves[virtual_rank] = self.leaf(virtual_rank) + self._flat.checksum(tensor, start).sum()

    def leaf(self, virtual_rank: int) -> Tensor:
        return self._leaves.get(virtual_rank, self._none)


class NoEvidence(Evidence):
    """Nothing is taken; all sums are 0."""

    def of_state(self, which: int, tensor: Tensor, start: int) -> None:
        pass

    def of_leaf(self, virtual_rank: int, tensor: Tensor, start: int) -> None:
        pass

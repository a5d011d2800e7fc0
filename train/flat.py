"""All parameters in one flat tensor, and gradients laid out the same way.

One layout serves the optimizer, the norm, the reduction, the checkpoint and the checksums:

    [ matrices, layer by layer | vectors … | zeros ]
      decayed                    not decayed  room up to a multiple of BLOCK·W: buckets cut into W equal chunks

Parameters stand in reverse order of registration, which is about the order in which their gradients become ready.
Each starts at a multiple of 64 elements and each section ends at a multiple of 1,024, so that vector instructions
round the same way wherever the tensor is cut (a fused AdamW rounds the last, partial vector of a tensor
differently), and so that norms can be summed in blocks of 1,024 whoever holds the block.

Beside it stands how the host's small tensors get to where the flat one is, without the host waiting (`to_device`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

ALIGN = 64  # elements between which a parameter may start
BLOCK = 1024  # elements in which norms are summed and sections end
SLICE = 1024 * BLOCK  # elements worked on at a time where intermediate results should stay in the cache

Range = tuple[int, int]  # first element, behind the last


def up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def chunk(bucket: Range, rank: int, world: int) -> Range:
    """A rank's part of a bucket: whole blocks, as even as they go, the last parts smaller or empty."""
    a, b = bucket
    size = up(b - a, BLOCK * world) // world
    return min(a + rank * size, b), min(a + (rank + 1) * size, b)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The host's `tensor` on a device; to a GPU from pinned memory: a copy from any other waits for all before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(slots=True)
class Buffer:
    """A gradient on its way: the flat `tensor`, its `views` in the parameters' shapes, and what rides along."""

    tensor: Tensor
    views: list[Tensor]
    numbers: Tensor  # (1 + N,) float64: the loss, and what the model tells besides
    tokens: int = 0  # checksum of the tokens that it was computed from
    loss: Tensor = field(init=False)  # (), the first of the numbers: nats per token of the step

    def __post_init__(self) -> None:
        self.loss = self.numbers[0]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one of the state's tensors that this rank holds: what checkpoints are made of."""

    file: str  # "model", "optimizer": the checkpoint file it belongs to
    name: str  # of the parameter; of a moment: exp_avg.<parameter>
    shape: torch.Size  # of the whole tensor
    offset: int  # elements of the whole tensor, flattened, that lie before this stretch
    data: Tensor  # 1-D, float32, contiguous: a view into the state, so that copying into it restores
    replicated: bool  # every rank holds this stretch, and one of them writes it


def layer(name: str) -> str:
    """`blocks.3.ffn.up.weight` -> `blocks.3`: the module that is computed as one. Empty for what is in none."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else ""


class Flat:
    """The flat layout of a model's parameters; the model's own tensors become views into `parameters`.

    `parameters` is float32, 1-D, `length` elements; those from `size` on are zeros. `owned` are the stretches that
    this rank's optimizer updates, tensors of their own into the same memory: all of it unless `own` says otherwise.
    """

    def __init__(self, model: nn.Module, most: int = 1) -> None:
        """`most`: the number of ranks among which it may be cut, now or later."""
        named = list(model.named_parameters())[::-1]
        matrices = [item for item in named if item[1].dim() >= 2]
        vectors = [item for item in named if item[1].dim() < 2]
        layers = [(unit, list(items)) for unit, items in groupby(matrices, key=lambda item: layer(item[0]))]
        self.items: list[nn.Parameter] = []
        self.slots: dict[str, tuple[int, int, torch.Size]] = {}  # name -> start, elements, shape
        self.sections: list[tuple[str, int, int]] = []  # the layer ("": of the whole model), start, end
        start = self.cut = 0  # `cut`: where the vectors begin
        for unit, items in [*layers, ("", vectors)]:
            first, self.cut = start, start
            for name, parameter in items:
                self.items.append(parameter)
                self.slots[name] = (start, parameter.numel(), parameter.shape)
                start = up(start + parameter.numel(), ALIGN)
            start = up(start, BLOCK)
            self.sections.append((unit, first, start))
        self.size = start
        self.length = self.size + BLOCK * (most - 1)
        self.device = named[0][1].device
        self._numbers = 1 + getattr(model, "aside", torch.empty(0)).numel()
        self.parameters = torch.zeros(self.length, dtype=torch.float32, device=self.device)
        for parameter, (begin, count, shape) in zip(self.items, self.slots.values(), strict=True):
            view = self.parameters[begin : begin + count].view(shape)
            view.copy_(parameter.data)
            parameter.data = view
        # Checksums weigh every ALIGN elements with an odd number, so that no single change goes unseen.
        self._weights = torch.arange(self.length // ALIGN, device=self.device) * 2 + 1
        self.own([[(0, self.size)]])

    def own(self, shares: Iterable[Iterable[Range]], rank: int = 0) -> None:
        """Let the optimizers of some ranks update these ranges, multiples of BLOCK, and this one those of `rank`.

        One share is everybody's. Call it before the optimizer is built.
        """
        self.shares = [[(a, b) for a, b in share if a < b] for share in shares]
        self.ranges = self.shares[rank]
        halves = [[(a, min(b, self.cut)) for a, b in self.ranges], [(max(a, self.cut), b) for a, b in self.ranges]]
        self.owned = [[(a, self.stretch(a, b).requires_grad_()) for a, b in half if a < b] for half in halves]

    def buffer(self, dtype: torch.dtype = torch.float32) -> Buffer:
        """A new gradient buffer of `length` elements, all zero; only a float32 one has views to accumulate into."""
        tensor = torch.zeros(self.length, dtype=dtype, device=self.device)
        views = list(self.named(tensor).values()) if dtype == torch.float32 else []
        return Buffer(tensor, views, torch.zeros(self._numbers, dtype=torch.float64, device=self.device))

    def attach(self, buffer: Buffer) -> None:
        """Let backward accumulate into `buffer`."""
        for parameter, view in zip(self.items, buffer.views, strict=True):
            parameter.grad = view

    def named(self, tensor: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor by parameter name, in the parameters' shapes."""
        return {name: tensor[begin : begin + n].view(shape) for name, (begin, n, shape) in self.slots.items()}

    def stretch(self, begin: int, end: int) -> Tensor:
        """The parameters in [begin, end), of what this rank holds: a view."""
        return self.parameters.detach()[begin:end]

    def buckets(self, elements: int, world: int) -> list[Range]:
        """The layout cut into pieces of at most `elements`, each a multiple of BLOCK·W."""
        end = up(self.size, BLOCK * world)
        return [(a, min(a + elements, end)) for a in range(0, end, elements)]

    def pieces(self) -> list[Piece]:
        """The parameters that this rank holds: here, all of them whole."""
        return self.named_parts("model", "", 0, self.parameters.detach(), replicated=True)

    def held(self) -> list[tuple[int, Tensor]]:
        """The parameters that this rank holds, each stretch with where it begins: views."""
        return [(0, self.parameters.detach())]

    def release(self) -> None:
        """Forget copies of what other ranks hold: they have changed it. Here there are none."""

    def gathered(self) -> AbstractContextManager[None]:
        """Hold all parameters whole, for whoever calls the model otherwise than by its forward pass."""
        return nullcontext()

    def named_parts(self, file: str, prefix: str, begin: int, values: Tensor, replicated: bool) -> list[Piece]:
        """The pieces, a parameter each, of a stretch of numbers laid out like the parameters from `begin` on."""
        end = begin + values.numel()
        return [
            Piece(
                file,
                prefix + name,
                shape,
                max(begin - start, 0),
                values[max(start - begin, 0) : min(end, start + n) - begin],
                replicated,
            )
            for name, (start, n, shape) in self.slots.items()
            if start < end and begin < start + n
        ]

    def step(self, update: Callable[[], object], gradient: Tensor, norm: Tensor, max_norm: float) -> None:
        """An optimizer's `update` of what this rank owns, the gradient scaled to at most `max_norm` (0: not) before."""
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float() if max_norm > 0 else None
        for half in self.owned:
            for start, tensor in half:
                tensor.grad = gradient[start : start + tensor.numel()]
                if scale is not None:
                    tensor.grad.mul_(scale)
        update()

    def checksum(self, tensor: Tensor, start: int) -> Tensor:
        """Of `tensor`, float32, which lies from `start` on: int64 for every ALIGN elements; they are to be summed.

        Integers modulo 2^64 add up to the same in any order: the sum does not depend on who holds which part. A
        single changed bit always changes it. Upper halves are mixed into lower ones, or two changed signs could
        cancel out: 2^63 times any odd number is 2^63.
        """
        groups = tensor.view(torch.int64).view(-1, ALIGN // 2).sum(1)
        groups ^= (groups >> 32) & 0xFFFFFFFF
        return groups.mul_(self._weights[start // ALIGN :][: groups.numel()])

    def by_parameter(self, checksums: Tensor, start: int, into: Tensor) -> None:
        """Add checksums of a stretch from `start` on to `into`, (P,), by the parameter that they belong to."""
        for index, (begin, n, _) in enumerate(self.slots.values()):
            first, end = (begin - start) // ALIGN, up(begin - start + n, ALIGN) // ALIGN
            if first < checksums.numel() and end > 0:
                into[index] += checksums[max(first, 0) : end].sum()


def squares(tensor: Tensor) -> Tensor:
    """The sums of squares of the blocks of a flat tensor, (n·BLOCK,) -> (n,) float32.

    Halved elementwise, not with a reduction kernel: how that adds may depend on how many rows it is given, and so on
    how many ranks share the work.
    """
    sums = []
    for part in tensor.split(SLICE):  # type: ignore[no-untyped-call]
        half = part.view(-1, BLOCK)
        width = BLOCK // 2
        half = half[:, :width].square().addcmul_(half[:, width:], half[:, width:])
        while width > 1:
            width //= 2
            half = half[:, :width] + half[:, width:]
        sums.append(half[:, 0])
    return torch.cat(sums)

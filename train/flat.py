"""All parameters in one flat tensor, and gradients laid out the same way.

One layout serves the optimizer, the norm, the reduction and the checkpoint:

    [ matrices … | vectors … | scalars ]
      decayed      not decayed  loss and flags that ride along with the gradients

Parameters stand in reverse order of registration, which is about the order in which their gradients become ready.
Each starts at a multiple of 64 elements and each section ends at a multiple of 1,024, so that vector instructions
round the same way wherever the tensor is cut (a fused AdamW rounds the last, partial vector of a tensor
differently), and so that norms can be summed in blocks of 1,024 whoever holds the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGN = 64  # elements between which a parameter may start
BLOCK = 1024  # elements in which norms are summed and sections end

LOSS, STOP = 0, 1  # places among the scalars: the loss; how many ranks were asked to stop


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True, slots=True)
class Buffer:
    """One flat gradient: `tensor` whole, `views` in the parameters' shapes, and the scalars at its end."""

    tensor: Tensor
    views: list[Tensor]
    scalars: Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one of the state's tensors that this rank holds: what checkpoints are made of."""

    file: str  # "model", "optimizer": the checkpoint file it belongs to
    name: str  # of the parameter; of a moment: exp_avg.<parameter>
    shape: torch.Size  # of the whole tensor
    offset: int  # elements of the whole tensor, flattened, that lie before this stretch
    data: Tensor  # 1-D, float32, contiguous: a view into the state, so that copying into it restores
    replicated: bool  # every rank holds this stretch, and one of them writes it


class Flat:
    """The flat layout of a model's parameters; the model's own tensors become views into `parameters`.

    `matrices` and `vectors` are the two trainable tensors that an optimizer sees (float32, 1-D). `size` counts the
    elements of both, padding included; a gradient buffer has BLOCK more, for the scalars.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())[::-1]
        sections = [[item for item in named if item[1].dim() >= 2], [item for item in named if item[1].dim() < 2]]
        self._parameters: list[nn.Parameter] = []
        self.slots: dict[str, tuple[int, int, torch.Size]] = {}  # name -> start, elements, shape
        ends = []
        start = 0
        for section in sections:
            for name, parameter in section:
                self._parameters.append(parameter)
                self.slots[name] = (start, parameter.numel(), parameter.shape)
                start = _up(start + parameter.numel(), ALIGN)
            start = _up(start, BLOCK)
            ends.append(start)
        self.size = start
        first = named[0][1]
        self.parameters = torch.zeros(self.size, dtype=torch.float32, device=first.device)
        for parameter, (begin, count, shape) in zip(self._parameters, self.slots.values(), strict=True):
            view = self.parameters[begin : begin + count].view(shape)
            view.copy_(parameter.data)
            parameter.data = view
        self.matrices = self.parameters[: ends[0]].requires_grad_()
        self.vectors = self.parameters[ends[0] :].requires_grad_()

    def buffer(self, multiple: int = BLOCK) -> Buffer:
        """A new gradient buffer: size + BLOCK elements, and zeros up to a multiple of `multiple`."""
        length = _up(self.size + BLOCK, multiple)
        tensor = torch.zeros(length, dtype=torch.float32, device=self.parameters.device)
        return Buffer(tensor, list(self.named(tensor).values()), tensor[self.size : self.size + BLOCK])

    def attach(self, buffer: Buffer) -> None:
        """Let backward accumulate into `buffer`."""
        for parameter, view in zip(self._parameters, buffer.views, strict=True):
            parameter.grad = view

    def named(self, tensor: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor by parameter name, in the parameters' shapes."""
        return {name: tensor[begin : begin + n].view(shape) for name, (begin, n, shape) in self.slots.items()}

    def step(self, optimizer: torch.optim.Optimizer, gradient: Buffer) -> None:
        """One optimizer step with a summed gradient."""
        self.matrices.grad = gradient.tensor[: self.matrices.numel()]
        self.vectors.grad = gradient.tensor[self.matrices.numel() : self.size]
        optimizer.step()

    def clip(self, gradient: Buffer, max_norm: float) -> Tensor:
        """Scale the gradient to at most `max_norm` (0: do not) and return its L2 norm before that, a float32 scalar.

        The norm is summed over blocks of BLOCK elements, then over the blocks: an order that does not depend on
        which rank holds which block.
        """
        elements = gradient.tensor[: self.size]
        blocks: Tensor = torch.linalg.vector_norm(elements.view(-1, BLOCK), dim=1)
        norm: Tensor = torch.linalg.vector_norm(blocks)
        if max_norm > 0:
            elements.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

"""What a step may not do: read a tensor, import torch's compiler, keep what a CUDA graph hands out.

Ranks that take one import no more than this.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train import buckets, compose, engine, flat, loop, plan
from train.data.prepare import prepare
from train.group import Group, Membership, Place
from train.telemetry import Recorder


class Unread(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """No operation may ask for a tensor's values, or for a size that depends on them: on a GPU the host would wait."""

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal", "bincount")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.seen.add(name)
        assert name not in self.READS, f"{name} in a step"
        if name in ("index", "index_put_", "index_put"):
            assert not [i for i in args[1] if i is not None and i.dtype == torch.bool], f"{name} by a mask in a step"
        return function(*args, **(kwargs or {}))


def built(group: Group, overrides: list[str]) -> tuple[loop.TrainState, loop.Parts]:
    config = plan.resolve(compose.config("train", overrides))
    prepared, _ = prepare(config.data, seed=config.seed, context=config.model.context)
    one = engine.Engine.build(config, prepared, group, threads=1)
    one.reducer.lay_out()
    return one.state, one.parts(Recorder(config, one.fabric, lambda _: None, prepared.vocab, one.model.aside.shape))


def alone(overrides: list[str]) -> None:
    """Print what of torch's compiler is there after a step of one rank."""
    group = Group(Place.alone(), Precision(), None, lambda: Membership(epoch=1, members=[0], host="", port=0))
    group.join()
    loop.step(*built(group, overrides))
    print([name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))])


def steps(group: Group, overrides: list[str]) -> tuple[list[str], int]:
    """Two steps on a rank, in which nothing may read a tensor: the second's operations, and copies to the device."""
    state, parts = built(group, overrides)
    readers = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
    kept = {name: getattr(Tensor, name) for name in readers}
    found: set[str] = set()
    copied: list[Tensor] = []

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        copied.append(tensor)
        return flat.to_device(tensor, device)

    loop.to_device = buckets.to_device = to_device  # type: ignore[attr-defined]
    try:
        torch.compiler.is_compiling = lambda: True  # experts as grouped products, as they are on a GPU
        for name in readers:  # of a tensor on the host some of them are no operation
            setattr(Tensor, name, reader(name))
        for _ in range(2):
            copied.clear()
            with Unread() as mode:  # type: ignore[no-untyped-call]
                loop.step(state, parts)
            found = mode.seen
    finally:
        for name in readers:
            setattr(Tensor, name, kept[name])
    return sorted(found), len(copied)


def reader(name: str) -> Any:
    def refuse(tensor: Tensor, *arguments: Any) -> Any:
        raise AssertionError(f"Tensor.{name} in a step")

    return refuse


class Replayed(torch.autograd.Function):
    """A model's passes as CUDA graphs replay them: what they hand out lies where it always lies, and is overwritten."""

    @staticmethod
    def forward(ctx: Any, nats: Callable[[], Tensor], places: list[Tensor], *parameters: Tensor) -> Tensor:
        for place in places:
            place.fill_(torch.nan)  # who has kept what was there has this now
        with torch.enable_grad():
            ctx.nats, ctx.places, ctx.parameters = nats(), places, parameters
        return places[0].copy_(ctx.nats.detach()).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = torch.autograd.grad(ctx.nats, ctx.parameters, gradients)
        return None, None, *(place.copy_(one).detach() for place, one in zip(ctx.places[1:], found, strict=True))


def replayed(group: Group, overrides: list[str], by_graphs: bool) -> list[str]:
    """Three steps' losses, and the parameters' sha256 then, by a model whose passes are replayed or by the model."""
    state, parts = built(group, overrides)
    model: Any = parts.model
    parameters = list(model.parameters())
    places = [torch.empty(()), *map(torch.empty_like, parameters)]

    def graphs(*sides: Tensor) -> Tensor:
        nats: Tensor = Replayed.apply(lambda: model(*sides), places, *parameters)  # type: ignore[no-untyped-call]
        return nats

    parts = replace(parts, model=graphs) if by_graphs else parts
    losses = [float(loop.step(state, parts)[0].loss).hex() for _ in range(3)]
    return [*losses, hashlib.sha256(state.flat.parameters.numpy().data).hexdigest()]

"""A step on a GPU that is not there: CUDA tensors with shapes and no values (torch's FakeTensorMode).

An operation that mixes devices fails, and so does a host that asks a tensor for its value. Autograd's engine wants the
device itself, so gradients are written by hand. It takes a torch that was built for CUDA, as PyPI's is on Linux.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import without_model
from train import buckets, compose, engine, loop, optim, plan
from train.config import Train
from train.data.prepare import prepare
from train.data.stream import Stream
from train.models.build import build
from train.ranks import Ranks

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # to ask whether two are one
]
CUDA = torch.device("cuda", 0)
models = pytest.mark.parametrize("model", ["llama_micro", "gpt2_micro", "grok_micro"])


class Nccl:
    """A communicator that answers at once, and what it was asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def collective(*arguments: Any) -> SimpleNamespace:
            assert {tensor.device for tensor in arguments if isinstance(tensor, Tensor)} == {CUDA}, name
            self.asked.add(name)
            return SimpleNamespace(wait=lambda: None)

        return collective


class Event:
    """torch's needs a driver."""

    def __init__(self, **_: Any) -> None: ...
    def record(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Event) -> float:
        return 1.0


class Apart(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """No operation takes something from the host to the device, which would wait; `to_device` does not."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        assert len({tensor.device for tensor in tensors}) < 2, function
        return result


@contextmanager
def autocast() -> Iterator[None]:
    """Switched by hand: `torch.autocast` leaves it off where no GPU is found."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        assert (tensor.device.type, device) == ("cpu", CUDA)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in (loop, buckets):
        monkeypatch.setattr(module, "to_device", to_device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    torch.set_deterministic_debug_mode("error")
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    torch.set_deterministic_debug_mode("default")


def configured(tiny: list[str], *more: str) -> Train:
    return plan.resolve(compose.config("train", [*without_model(tiny), "name=a", "devices=1", "precision=bf16", *more]))


@models
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "more",
    [
        ["data.mask_documents=true", "evidence.parameters=true"],
        ["optimizer=muon", "model.loss_chunk=16", "reduce.dtype=bf16"],
        ["reduce=fast", "model.dropout=0.1", "model.z_loss=1e-4"],
        ["sharding=optimizer", "model.checkpoint_activations=full"],
        ["nodes=2", "optimizer=muon"],  # inside hosts first
    ],
    ids=lambda more: more[0],
)
def test_all_of_a_step_is_on_the_device(
    tiny: list[str], model: str, world: int, more: list[str], pretended: None
) -> None:
    """Of one GPU's, and of the second's of three over NCCL."""
    config = configured(tiny, f"model={model}", "model.context=32", *more)
    prepared, _ = prepare(config.data, seed=config.seed, context=config.model.context)
    built = build(config.model, prepared.vocab, seed=0, device=CUDA, separator=prepared.separator)
    nccl = Nccl()
    ranks = Ranks(min(1, world - 1), world, CUDA, nccl)
    ranks.hosts = [0, 0, 1][:world]
    flat, reducer = engine.laid_out(config, ranks, built)
    state = loop.TrainState(step=0, flat=flat, optimizer=optim.build(config.optimizer, flat, ranks))
    reducer.lay_out()

    def backward(loss: Tensor) -> None:
        assert loss.device == CUDA
        for parameter in built.parameters():
            assert parameter.grad is not None
            parameter.grad.add_(torch.ones_like(parameter))
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)

    parts: Any = SimpleNamespace(
        **{"config": config, "model": built, "aside": built.aside, "reducer": reducer},
        **{"stream": Stream.of(config, prepared), "generator": torch.default_generator},
        **{"phase": lambda name, step: None, "asked": lambda: (False, False)},
        fabric=SimpleNamespace(device=CUDA, autocast=autocast, backward=backward),
    )
    for _ in range(2):
        with Apart():  # type: ignore[no-untyped-call]
            total, _ = loop.step(state, parts)
    assert {getattr(total, field.name).device for field in fields(total)} == {CUDA}
    assert {piece.data.device for piece in state.pieces()} == {CUDA}
    sums = {"allreduce"} if "reduce=fast" in more else {"alltoall_base"}
    assert nccl.asked - {"broadcast"} == (sums | {"_allgather_base"} if world > 1 else set())


@models
def test_what_is_compiled_is_one_graph_that_cuda_graphs_may_hold(model: str, tiny: list[str], pretended: None) -> None:
    """Its forward pass: nothing of it on the host, nothing that the host would have to wait for."""
    config = configured(tiny, f"model={model}", "model.context=32")
    built = build(config.model, 300, seed=0, device=CUDA).requires_grad_(False)
    found: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.append(graph)
        return graph.forward

    backend = aot_autograd(fw_compiler=look, inference_compiler=look, decompositions=select_decomp_table())
    tokens = torch.zeros(2, 32, dtype=torch.long, device=CUDA)
    with autocast():
        torch.compile(built, fullgraph=True, dynamic=False, backend=backend)(tokens, tokens)
    (graph,) = found
    assert get_first_incompatible_cudagraph_node(graph) is None
    values = [node.meta.get("val") for node in graph.graph.nodes]
    assert {value.device for value in values if isinstance(value, Tensor)} == {CUDA}

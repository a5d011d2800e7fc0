"""Run a function on N ranks, each a process forked from one forkserver that has torch imported.

    results = run("tests.test_reduce:sums", world=3, virtual_ranks=8)

The function is called as `function(group, **arguments)` on every rank, with the group that it has joined (torch's
default group has the same ranks), and returns something that JSON can carry; `run` returns these by rank. An exception
on a rank is raised here, with its traceback.
"""

from __future__ import annotations

import importlib
import json
import socket
import traceback
from multiprocessing.connection import Connection
from typing import Any

from train import nodes, processes

TIMEOUT = 120.0  # seconds; far more than any of these functions takes


def run(function: str, world: int, **arguments: Any) -> list[Any]:
    context = processes.forkserver()
    listener = nodes.listen(nodes.here(1))
    port = listener.getsockname()[1]
    pipes, ranks = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        sent = listener if rank == 0 and world > 1 else None
        process = context.Process(target=_rank, args=(function, rank, world, port, json.dumps(arguments), theirs, sent))
        process.start()
        theirs.close()
        pipes.append(ours)
        ranks.append(process)
    listener.close()
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} of {function} is silent")
            answer = json.loads(pipe.recv_bytes())
            if "error" in answer:
                raise AssertionError(f"rank {rank}: {answer['error']}")
            results.append(answer["result"])
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
            process.join()
    return results


def _rank(
    function: str,
    rank: int,
    world: int,
    port: int,
    arguments: str,
    connection: Connection,
    listener: socket.socket | None,
) -> None:
    import torch
    from lightning.fabric.plugins import Precision
    from torch._C._distributed_c10d import PrefixStore

    from train.group import Group, Membership, Place

    place = Place(member=rank, local_rank=rank, device="cpu", loopback=True, backend="gloo", heals=False)
    membership = Membership(epoch=1, members=list(range(world)), host="127.0.0.1", port=port)
    group = Group(place, Precision(), listener, lambda: membership)
    try:
        torch.set_num_threads(1)
        group.join()
        if world > 1:
            store = PrefixStore("default", group.store)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
        module, name = function.split(":")
        answer = {"result": getattr(importlib.import_module(module), name)(group, **json.loads(arguments))}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    connection.send_bytes(json.dumps(answer).encode())
    group.leave()

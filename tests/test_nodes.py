"""Where a process stands among nodes, from what launchers set."""

from __future__ import annotations

import pytest

from train import nodes
from train.checks import Refused


def test_one_node_needs_nobody_to_say_so() -> None:
    assert nodes.here(1, {"PET_NODE_RANK": "3", "PET_MASTER_ADDR": "x"}) == nodes.Node(0, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("environment", "node"),
    [
        (
            {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "10.0.0.1", "PET_MASTER_PORT": "29500"},
            nodes.Node(1, "10.0.0.1", 29500),
        ),
        ({"SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[07-09,12],big1"}, nodes.Node(2, "gpu07", nodes.PORT)),
        ({"SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "alpha,beta"}, nodes.Node(0, "alpha", nodes.PORT)),
        (
            {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6"},
            nodes.Node(0, "10.0.0.5", nodes.PORT),
        ),
    ],
)
def test_what_launchers_say(environment: dict[str, str], node: nodes.Node) -> None:
    assert nodes.here(3, environment) == node


def test_what_nobody_says_is_refused() -> None:
    with pytest.raises(Refused, match="PET_NODE_RANK"):
        nodes.here(2, {})
    with pytest.raises(Refused, match="this is node 2, but there are 2"):
        nodes.here(2, {"PET_NODE_RANK": "2", "PET_MASTER_ADDR": "x"})


def test_one_host_listens_on_loopback() -> None:
    with nodes.listen(nodes.here(1)) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        port = listener.getsockname()[1]
        with pytest.raises(Refused, match="cannot be listened at"):
            nodes.listen(nodes.here(1), port)

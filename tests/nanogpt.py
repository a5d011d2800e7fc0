"""nanoGPT's train.py under the batch law: which of its lines change, and into what.

    python -m tests.nanogpt ~/nanoGPT | git -C ~/nanoGPT apply

prints the change as a diff. Nothing of nanoGPT (Andrej Karpathy, MIT licence) is kept here but what finds the places.
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    """Each place is found by a regular expression that must match exactly once."""

    place: str
    becomes: str
    why: str


CPU = [
    Edit(r"^(    device = f'cuda:.*')$", r"\1 if device != 'cpu' else device", "torchrun on a CPU"),
    Edit(r"^    (torch\.cuda\.set_device)", r"    if device != 'cpu': \1", "torchrun on a CPU"),
]
UNPATCHED = [*CPU, Edit(r"device_ids=\[ddp_local_rank\]", "device_ids=None", "DDP on a CPU")]
EXACT = [
    *CPU,
    Edit(
        r"^(from model import .*)$",
        r"\1\nimport sys\n"
        r"sys.path.append(sys.path.pop(0)) # or else 'train' is this very file"
        r"\nfrom train.reduce import ExactReducer",
        "a script's own folder comes first on Python's path, and this script is called like the package",
    ),
    Edit(
        r"^if ddp:\n    model = DDP\(.*$",
        "reducer = ExactReducer.of(model, virtual_ranks=gradient_accumulation_steps * ddp_world_size)",
        "in the place of DDP; nanoGPT's accumulation steps, all ranks' together, are the virtual ranks",
    ),
    Edit(r"model\.module if ddp else model", "model", "nothing wraps it"),
    Edit(
        r"^        # immediately async prefetch.*\n        X, Y = .*$",
        r"        buffer.loss += loss.detach()",
        "each batch is drawn when it is its turn, as what comes next depends on the rank; and losses add up as well",
    ),
    Edit(
        r"^    for micro_step in range\(.*$",
        r"    for micro_step, _, buffer in reducer.micro_batches(1337, iter_num):\n        X, Y = get_batch('train')",
        "the accumulation steps that this rank hosts; get_batch and dropout draw from the generator seeded for each",
    ),
    Edit(
        r"loss / gradient_accumulation_steps",
        r"loss / (gradient_accumulation_steps * ddp_world_size)",
        "ranks' gradients are summed, where DDP takes their mean",
    ),
    Edit(r"^(    # clip the gradient)$", r"    total = reducer.finish()\n\1", "from here on every .grad holds the sum"),
    Edit(r"loss\.item\(\) \* gradient_accumulation_steps", "total.loss.item()", "of all the step's tokens"),
]


def edited(text: str, edits: list[Edit]) -> str:
    for edit in edits:
        text, found = re.subn(edit.place, edit.becomes, text, flags=re.MULTILINE)
        assert found == 1, f"{edit.place!r} is found {found} times in this train.py, not once"
    return text


def changed_lines(before: str, after: str) -> tuple[int, int]:
    """Lines that are new or other than before; lines that went and have none in their place."""
    pairs = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False).get_opcodes()
    changes = [(end - start, until - since) for kind, start, end, since, until in pairs if kind != "equal"]
    return sum(new for _, new in changes), sum(max(0, old - new) for old, new in changes)


if __name__ == "__main__":
    original = (Path(sys.argv[1]).expanduser() / "train.py").read_text()
    both = original.splitlines(keepends=True), edited(original, EXACT).splitlines(keepends=True)
    sys.stdout.writelines(difflib.unified_diff(*both, "a/train.py", "b/train.py"))

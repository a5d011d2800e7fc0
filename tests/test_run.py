"""What a rank says when it fails: one line, and what to change where that is known."""

from __future__ import annotations

import pytest
import torch

from train.checks import Refused
from train.run import _cause
from train.saver import NotSaved


@pytest.mark.parametrize(
    ("error", "fault", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "out of memory", "micro_batch"),
        (MemoryError(), "out of memory", "batch.micro_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory", "micro_batch"),
        (Refused("data", "is gone"), "refused", "data: is gone"),
        (NotSaved("of step 6"), "not saved", "of step 6"),
        (ValueError("first\nsecond"), "exception", "ValueError: first"),
        (AssertionError(), "exception", "AssertionError"),
    ],
)
def test_the_cause_of_a_failure_is_one_line(error: BaseException, fault: str, words: str) -> None:
    kind, cause = _cause(error)
    assert kind == fault
    assert words in cause
    assert "\n" not in cause

"""What a measurement leaves: its figures as JSON under results/, with the machine and the versions they are of."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch

from train.hardware import processor

RESULTS = Path(__file__).parent / "results"


def write(name: str, command: str, **figures: Any) -> None:
    """Write `figures` to results/NAME.json, and say so."""
    head = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "cpu": processor()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(head | figures, indent=1) + "\n")
    print(f"written to {path}")

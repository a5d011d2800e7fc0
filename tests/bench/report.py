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


def write(name: str | Path, command: str, **figures: Any) -> dict[str, Any]:
    """Write `figures` to results/NAME.json, or to a path, and say so; what has been written."""
    head = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "cpu": processor()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    path = name if isinstance(name, Path) else RESULTS / f"{name}.json"
    path.write_text(json.dumps(head | figures, indent=1) + "\n")
    print(f"written to {path}")
    return head | figures

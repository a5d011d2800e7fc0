"""lightning.fabric without torchmetrics, which it imports to learn its version, and with it transformers where that is
installed: a quarter of a rank's imports. The first import of a process; torchmetrics itself can be imported later."""

import sys

sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # an import fails, and the version is unknown
import lightning.fabric  # noqa: E402, F401

del sys.modules["torchmetrics"]

"""lightning.fabric without lightning.pytorch, torchmetrics and, through that, transformers: 1.6 of 4.5 s of imports;
and without torch's compiler, which it would tell a compiled module by: as much again. Ours never see Fabric.

What is imported stays for good, so Python's collector need not look at it: not while it is imported, which would take
a tenth of the time, nor in the ranks that are forked from here, nor when all is over.
"""

import gc
import importlib.util
import sys
import types

gc.disable()
if spec := importlib.util.find_spec("lightning"):
    sys.modules["lightning"] = importlib.util.module_from_spec(spec)  # a package that has not been run
sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # an import fails, and the version is unknown
compiler = types.ModuleType("torch._dynamo")
compiler.OptimizedModule = type("OptimizedModule", (), {})  # type: ignore[attr-defined]
sys.modules.setdefault("torch._dynamo", compiler)
import lightning.fabric  # noqa: E402, F401

del sys.modules["torchmetrics"]
if sys.modules["torch._dynamo"] is compiler:
    del sys.modules["torch._dynamo"]
gc.freeze()
gc.enable()

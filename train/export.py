"""`colossus export`: a run's model and tokenizer as a folder that transformers loads, and `model=hf`.

`config.json` and `model.safetensors` (fp32), whose layout `models/hf.py` knows, and the tokenizer as `tokenizer.json`.
The weights are the run's own, bit for bit. The folder has another name while it is written: it is whole or not there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from train import trained
from train.checks import Refused, place, require
from train.commands import Export
from train.data.tokenizer import Tokenizer
from train.folder import locate
from train.models import hf
from train.shapes import Grok


def export(config: Export) -> int:
    folder = locate(config.run)
    out = place(config.out, "out") if config.out else folder / config.format.value
    require(not (out.exists() or out.is_symlink()), "out", f"{out} is there already: remove it, or name another folder")
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)  # before the model is loaded, which takes longer than to find that it cannot be
        run = trained.load(folder, config.step, torch.device("cpu"))
        hf.write(draft, run.model, run.tokenizer.eot)
        if not write_tokenizer(draft, run.tokenizer, run.config.model.context):
            print("the run's ids stand for no text: there is no tokenizer to export")
        draft.rename(out)
    except OSError as error:
        raise Refused("out", f"{out} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"step {run.step} of {config.run} is in {out}")
    if isinstance(run.model.shape, Grok):
        print(f"transformers has no Grok-1; it goes on with colossus train model=hf model.path={out}")
    return 0


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> bool:
    """What AutoTokenizer reads; returns whether there is one. It takes `<|endoftext|>` in a text for the end of one."""
    library = tokenizer.published()
    if library is None:
        return False
    (folder / "tokenizer.json").write_text(library.to_str())
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": library.id_to_token(tokenizer.eot),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return True

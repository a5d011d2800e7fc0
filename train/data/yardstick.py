"""How well a program that learned nothing compresses the validation set.

Bits per byte compare models with different tokenizers, and with a compressor. gzip is measured on exactly the bytes
that the model is, twice: on windows of the model's context, where it sees what the model sees, and on whole
documents, where it sees more. A window of 256 tokens is about 800 bytes, of which gzip's own header and trailer,
counted here as in any .gz file, are 18: 0.2 bits per byte of the windows' figure.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable

from train.data.stream import Validation


def yardsticks(validation: Validation) -> dict[str, float | None]:
    """`gzip -9` in bits per byte: gzip_windows and gzip_documents. None where ids stand for no known bytes."""
    if not validation.lossless or not validation.bytes:
        return {"gzip_windows": None, "gzip_documents": None}
    return {
        "gzip_windows": bits_per_byte(validation.window_bytes(), validation.bytes),
        "gzip_documents": bits_per_byte(validation.text_bytes(), validation.bytes),
    }


def bits_per_byte(pieces: Iterable[bytes], size: int) -> float:
    """Bits of the pieces, each compressed by itself, over `size` bytes."""
    return 8 * sum(len(gzip.compress(piece, compresslevel=9, mtime=0)) for piece in pieces if piece) / size

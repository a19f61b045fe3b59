"""Read the data that ships with raykiln."""

import gzip
import json
from functools import cache
from pathlib import Path

from cluster.storage import sha256

FOLDER = Path(__file__).parent


@cache
def shipped(name: str) -> Path:
    """Return the path of a shipped file, e.g. "shakespeare.parquet".

    Its hash is checked once per process.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = FOLDER / name
    expected = json.loads((FOLDER / "sha256.json").read_text())[name]
    if not path.is_file() or sha256(path) != expected:
        raise ValueError(
            f"{path}, which ships with raykiln, is missing or damaged: restore it with "
            f"`git checkout -- {path}`"
        )
    return path


def gpt2_tokenizer() -> str:
    """Return GPT-2's byte-level BPE (50,257 entries) as the JSON of `tokenizers`."""
    return gzip.decompress(shipped("gpt2-tokenizer.json.gz").read_bytes()).decode()

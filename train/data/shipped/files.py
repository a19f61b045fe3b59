"""The data that ships with raykiln, and data sets fetched by name, as local files."""

import gzip
import json
from functools import cache
from pathlib import Path

from cluster.storage import sha256

FOLDER = Path(__file__).parent


@cache
def shipped(name: str) -> Path:
    """The shipped file `name` (e.g. "shakespeare.parquet"), its hash checked once a process.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = FOLDER / name
    expected = json.loads((FOLDER / "sha256.json").read_text())[name]
    if not path.is_file() or sha256(path) != expected:
        raise ValueError(
            f"{path}, which ships with raykiln, is missing or damaged: restore it with `git checkout -- {path}`"
        )
    return path


def gpt2_tokenizer() -> str:
    """GPT-2's byte-level BPE (50,257 entries) as `tokenizers` JSON."""
    return gzip.decompress(shipped("gpt2-tokenizer.json.gz").read_bytes()).decode()


def hub_parquet(name: str) -> Path:
    """A folder with the parquet files of a Hugging Face data set (`owner/name` or `owner/name:config`), downloaded once.

    The hub converts every data set to parquet under the revision refs/convert/parquet, as CONFIG/SPLIT/NNNN.parquet.

    Raises:
        ValueError: there is no such data set, or no way to reach the hub.
    """
    from huggingface_hub import snapshot_download

    repository, _, config = name.partition(":")
    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset",
            revision="refs/convert/parquet",
            allow_patterns=f"{config or '*'}/**",
        )
    except (
        Exception
    ) as error:  # the hub client raises a dozen unrelated types for "not there" and "no network"
        raise ValueError(
            f"data.source hf:{name} could not be fetched from the Hugging Face hub ({type(error).__name__}): check the name and the network, or give local files"
        ) from error
    return Path(folder)

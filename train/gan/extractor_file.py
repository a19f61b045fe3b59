"""An extractor's file: its weights, its config and its card, named by their hash.

A file whose content does not match the hash in its name is refused.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save

from cluster import storage
from models.nets.features import Extractor, ExtractorConfig
from train.data.dataset import ExtractorEntry

VERSION = 1  # part of the file's name: increase it when the net or its training changes

Task = Literal["classes", "rotations"]
"""What an extractor is trained to recognize: the class of an image, or its rotation by 0, 90, 180
or 270 degrees."""


@dataclass(frozen=True)
class Card:
    """What an extractor's file says about it."""

    task: Task
    accuracy: float
    """The fraction of the held-out images, never trained on, that it classifies correctly."""
    heldout: int
    """The number of held-out images."""
    train: int
    """The number of images that it was trained on."""
    classes: list[str]
    dataset: str
    """The fingerprint of the data set that it was trained on."""

    def __str__(self) -> str:
        what = f"{len(self.classes)} classes" if self.task == "classes" else "4 rotations"
        return f"{what}, {self.accuracy:.1%} of {self.heldout:,} held-out images correct"


def find(dataset_uri: str, size: int) -> str | None:
    """Return the URI of the extractor beside a data set, or None.

    Args:
        dataset_uri: the data set's folder.
        size: pixels per side of the generator's images.
    """
    prefix = _prefix(size)
    for name in storage.names(dataset_uri):
        if name.startswith(prefix) and name.endswith(".safetensors"):
            return storage.join(dataset_uri, name)
    return None


def pack(extractor: Extractor, card: Card) -> bytes:
    """Return the content of an extractor's file: safetensors, with its config and its card in the
    header."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in extractor.state_dict().items()}
    about = {"config": asdict(extractor.config), "card": asdict(card)}
    # A single key: safetensors writes several in random order.
    return save(tensors, {"extractor": json.dumps(about)})


def unpack(content: bytes, origin: str) -> tuple[Extractor, Card]:
    """Return what `pack` has packed; the extractor in eval mode on the CPU.

    Args:
        content: of the file.
        origin: what an error calls the file.

    Raises:
        ValueError: the content is not an extractor's, or of another version.
    """
    try:
        tensors = parse(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"]["extractor"])
        extractor = Extractor(ExtractorConfig(**about["config"]))
        extractor.load_state_dict(tensors)
        return extractor.eval().requires_grad_(False), Card(**about["card"])
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        problem = str(error).splitlines()[0]
        raise ValueError(
            f"{origin} is not an extractor of this version ({problem}): delete it, and one will be "
            "trained"
        ) from None


def publish(content: bytes, dataset_uri: str, size: int) -> str:
    """Write an extractor's file beside its data set; return its URI."""
    name = f"{_prefix(size)}{fingerprint(content)}.safetensors"
    uri = storage.join(dataset_uri, name)
    storage.write_bytes(uri, content)
    return uri


def fingerprint(content: bytes) -> str:
    """Return the first 12 hex digits of the content's SHA-256."""
    return hashlib.sha256(content).hexdigest()[:12]


def read(uri: str) -> tuple[Extractor, Card]:
    """Read an extractor, in eval mode on the CPU, and its card.

    Raises:
        ValueError: the file is missing, damaged or of another version.
    """
    return unpack(_read_content(uri), uri)


def load(uri: str, device: torch.device | str) -> Extractor:
    """Load an extractor in eval mode on `device`; see `read`."""
    return read(uri)[0].to(device)


def lineage_entry(uri: str) -> ExtractorEntry:
    """Return what a run's lineage says about its extractor."""
    content = _read_content(uri)
    _, card = unpack(content, uri)
    return {
        "uri": uri,
        "sha256": hashlib.sha256(content).hexdigest(),
        "task": card.task,
        "accuracy": card.accuracy,
        "heldout": card.heldout,
        "train": card.train,
        "classes": card.classes,
        "dataset": card.dataset,
    }


def _read_content(uri: str) -> bytes:
    """Read a file and check it against the hash in its name."""
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        raise ValueError(
            f"{uri} is missing: start the run again, and the extractor will be trained again"
        ) from None
    if not uri.endswith(f"-{fingerprint(content)}.safetensors"):
        raise ValueError(
            f"{uri} is damaged (its sha256 is not the one in its name): delete it, and the "
            "extractor will be trained again"
        )
    return content


def _prefix(size: int) -> str:
    return f"extractor-v{VERSION}-{size}px-"

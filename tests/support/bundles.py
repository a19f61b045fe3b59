"""Small real bundles, exported by the real export: made once, then copied (they take seconds).

tiny_gpt_bundle(tmp_path / "gpt")
registry.publish(root, "gpt", tmp_path / "gpt")
"""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from models import bundle
from models.nets import gpt
from models.nets.dcgan import DcganConfig, Generator
from train.gan.export import export_gan
from train.gpt.export import export_gpt

TEXT = """\
Now is the winter of our discontent made glorious summer by this sun of York; and all the clouds that lour'd
upon our house in the deep bosom of the ocean buried. Now are our brows bound with victorious wreaths; our bruised
arms hung up for monuments; our stern alarums changed to merry meetings, our dreadful marches to delightful measures.
Même l'été s'achève — “naïve façade”, 日本語, ελληνικά, 🙂.
"""
LINEAGE = {
    "created": "2000-01-01T00:00:00+00:00",
    "run": {"name": "tiny", "step": 0, "storage": "none"},
    "dataset": {"name": "tiny", "fingerprint": "0"},
    "metrics": {},
    "libraries": {},
}


def tiny_tokenizer(path: Path) -> Tokenizer:
    """A byte-level BPE of 320 entries trained on `TEXT`, <|endoftext|> first, saved at `path`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))
    return tokenizer


def tiny_gpt(seed: int = 0, vocab_size: int = 320, context: int = 64) -> Any:
    """A GPT-2 of two layers with random weights."""
    torch.manual_seed(seed)
    return gpt.build(
        vocab_size=vocab_size, context=context, width=32, layers=2, heads=2, eos_token_id=0
    ).eval()


def learn(model: Any, ids: np.ndarray, steps: int = 60) -> None:
    """Teaches `model` the text by heart, so that what it says is text and its likeliest tokens are far from ties."""
    windows = torch.from_numpy(ids).unfold(0, 33, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        gpt.NextTokenLoss(model)(windows[:, :-1], windows[:, 1:]).backward()
        optimizer.step()


def tiny_generator(num_classes: int = 0, seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    return Generator(
        DcganConfig(image_size=28, latent_dim=16, width=4, num_classes=num_classes)
    ).eval()


def tiny_gpt_bundle(folder: Path, seed: int = 0, weights: str = "fp32") -> Path:
    """A GPT bundle at `folder` that has learnt `TEXT`: 320 tokens, context 64; another seed is another model."""
    return Path(shutil.copytree(_gpt_bundle(seed, weights), folder, dirs_exist_ok=True))


def tiny_gan_bundle(folder: Path, num_classes: int = 0, seed: int = 0) -> Path:
    """A GAN bundle at `folder`: 28 x 28 grey, latents of 16; conditional where `num_classes` is given."""
    return Path(shutil.copytree(_gan_bundle(num_classes, seed), folder, dirs_exist_ok=True))


@functools.cache
def learnt_gpt(seed: int = 0) -> tuple[Any, Path, np.ndarray]:
    """A GPT that has learnt `TEXT`, its tokenizer's file, and the text's ids."""
    torch.set_num_threads(1)  # more only wait for each other on so small a model
    file = _scratch() / "tokenizer.json"
    ids = np.array(tiny_tokenizer(file).encode(TEXT).ids)
    model = tiny_gpt(seed)
    learn(model, ids)
    return model, file, ids


@functools.cache
def _gpt_bundle(seed: int, weights: str) -> Path:
    model, tokenizer_file, ids = learnt_gpt(seed)
    folder = _scratch() / "gpt"
    folder.mkdir()
    bundle.write(folder, LINEAGE | export_gpt(model, tokenizer_file, ids, folder, weights))
    return folder


@functools.cache
def _gan_bundle(num_classes: int, seed: int) -> Path:
    folder = _scratch() / "gan"
    folder.mkdir()
    names = [f"class {label}" for label in range(num_classes)]
    bundle.write(folder, LINEAGE | export_gan(tiny_generator(num_classes, seed), names, folder))
    return folder


_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the test process ends


def _scratch() -> Path:
    _folders.append(tempfile.TemporaryDirectory(prefix="kiln-bundle-"))
    return Path(_folders[-1].name)

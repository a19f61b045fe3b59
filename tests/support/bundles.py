"""Small bundles, made by the real export once per process and then copied.

tiny_gpt_bundle(tmp_path / "gpt")
registry.publish(root, "gpt", tmp_path / "gpt")
"""

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GPT2LMHeadModel

from models import bundle
from models.nets import gpt
from models.nets.dcgan import DcganConfig, Generator
from train.gan.export import export_gan
from train.gpt.export import export_gpt

TEXT = """\
Now is the winter of our discontent made glorious summer by this sun of York; and all the clouds \
that lour'd
upon our house in the deep bosom of the ocean buried. Now are our brows bound with victorious \
wreaths; our bruised
arms hung up for monuments; our stern alarums changed to merry meetings, our dreadful marches to \
delightful measures.
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
    """Train a byte-level BPE of 320 entries on `TEXT`, <|endoftext|> first, and save it."""
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


def tiny_gpt(seed: int = 0, vocab_size: int = 320, context: int = 64) -> GPT2LMHeadModel:
    """Return a GPT-2 of two layers with random weights, in eval mode."""
    torch.manual_seed(seed)
    model = gpt.build(
        vocab_size=vocab_size, context=context, width=32, layers=2, heads=2, eos_token_id=0
    )
    model.train(False)
    return model


def learn(model: GPT2LMHeadModel, ids: np.ndarray, steps: int = 60) -> None:
    """Train `model` until it knows a text by heart: then its likeliest tokens are far from ties."""
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
    """Write a GPT trained on `TEXT`: 320 tokens, context 64; each seed is another model."""
    return Path(shutil.copytree(_gpt_bundle(seed, weights), folder, dirs_exist_ok=True))


def tiny_gan_bundle(folder: Path, num_classes: int = 0, seed: int = 0) -> Path:
    """Write a GAN bundle: 28 x 28 grayscale, latents of 16, conditional with `num_classes`."""
    return Path(shutil.copytree(_gan_bundle(num_classes, seed), folder, dirs_exist_ok=True))


@functools.cache
def trained_gpt(seed: int = 0) -> tuple[GPT2LMHeadModel, Path, np.ndarray]:
    """Return a GPT trained on `TEXT`, the file of its tokenizer, and the ids of the text."""
    torch.set_num_threads(1)  # more threads are slower for so small a model
    file = _scratch() / "tokenizer.json"
    ids = np.array(tiny_tokenizer(file).encode(TEXT).ids)
    model = tiny_gpt(seed)
    learn(model, ids)
    return model, file, ids


@functools.cache
def _gpt_bundle(seed: int, weights: str) -> Path:
    model, tokenizer_file, ids = trained_gpt(seed)
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

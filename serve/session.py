"""A bundle, loaded and verified: text or pictures out of ONNX Runtime. No Ray, no torch, no HTTP."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from cluster import storage
from models import bundle
from models.latents import seeded_latents, truncated, walk
from models.runtime import ImageGraph, TextGraph

IMAGE_TOLERANCE = 1e-3  # of a golden picture's values in [-1, 1]: a tenth of a grey level; another CPU rounds differently


class TextSession(TextGraph):
    """A GPT bundle: `prefill` and `decode` over `slots` (see `models.runtime.TextGraph`).

    Args:
        folder: the bundle, on this machine.
        slots: sequences that can be under way at once.
        threads: CPU threads of one operator; one is best for tiny models.
        providers: of `models.runtime.PROVIDERS`, best first; by default TensorRT, CUDA, CPU, as available.

    Raises:
        ValueError: the folder is no GPT bundle, or a file of it is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        slots: int = 8,
        threads: int = 1,
        providers: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = _verified(self.folder, "gpt")
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.eos_token_id: int = self.manifest["model"]["eos_token_id"]
        self.sample = _sample(self.folder, self.manifest)
        super().__init__(
            self.folder / "model.onnx", self.manifest["model"]["context"], slots, threads, providers
        )

    def replay_golden(self) -> None:
        """Answers the prompt recorded at export again, in slot 0.

        Each recorded token must be the likeliest after those before it, or as good as: another CPU, or a GPU, rounds differently,
        and a logit may be off by what the export allowed.

        Raises:
            ValueError: ids, tokens or text are not as recorded.
        """
        golden = storage.read_json(self.folder / "golden.json")
        ids, tokens = golden["ids"], golden["tokens"]
        self._compare("ids", ids, self.tokenizer.encode(golden["prompt"]).ids)
        self._compare("text", golden["text"], self.tokenizer.decode(tokens))
        expected = tokens if len(tokens) == golden["max_tokens"] else [*tokens, self.eos_token_id]
        for place, token in enumerate(expected):
            logits = (
                self.decode([0], [expected[place - 1]], [len(ids) + place - 1])[0]
                if place
                else self.prefill(0, ids)
            )
            if not logits.max() - logits[token] <= 2 * self.manifest["parity"]["tolerance"]:
                self._compare("tokens", tokens, [*tokens[:place], int(logits.argmax())])

    def _compare(self, part: str, recorded: object, answer: object) -> None:
        if answer != recorded:
            raise ValueError(
                f"{self.folder} gives other {part} than golden.json recorded at its export ({answer!r}): export the run again"
            )


class ImageSession(ImageGraph):
    """A GAN bundle: seeded pictures.

    Args:
        folder: the bundle, on this machine.
        threads: CPU threads of one operator.
        providers: as for `TextSession`.

    Raises:
        ValueError: the folder is no GAN bundle, or a file of it is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        threads: int = 1,
        providers: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = _verified(self.folder, "gan")
        self.latent_dim: int = self.manifest["model"]["latent_dim"]
        self.num_classes: int = self.manifest["model"]["num_classes"]
        self.sample = _sample(self.folder, self.manifest)
        super().__init__(self.folder / "model.onnx", threads, providers)

    def generate(
        self, latents: np.ndarray, labels: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """Pictures (B, H, W, C) uint8 of latents (B, Z) and, exactly where the generator is conditional, labels (B).

        Raises:
            ValueError: labels are missing, superfluous, or no class of the model.
        """
        if (labels is not None) != (self.num_classes > 0):
            raise ValueError(
                f"labels must {'be given' if self.num_classes else 'be left out'}: the model has {self.num_classes} classes"
            )
        if labels is not None and not all(0 <= label < self.num_classes for label in labels):
            raise ValueError(
                f"labels are {list(labels)}: the model has the classes 0 to {self.num_classes - 1}"
            )
        images = self.run(latents, None if labels is None else np.asarray(labels))
        return np.rint((images + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)

    def pictures(
        self, seed: int, count: int, label: int | None = None, truncation: float | None = None
    ) -> np.ndarray:
        """The first `count` pictures of a seed, (count, H, W, C) uint8: each the same alone or in company.

        Args:
            seed: 0 to 2**64 - 1.
            label: the class of all; without one, a conditional model takes its classes in turn.
            truncation: where the latents' normal distribution is cut off (`models.latents.truncated`); None: nowhere.

        Raises:
            ValueError: the seed is out of range, no picture is asked for, or there is no such class.
        """
        if count < 1:
            raise ValueError(f"count is {count}: ask for one picture or more")
        return self.generate(
            self._latents(seed, count, truncation), self.labels(seed, count, label)
        )

    def interpolation(
        self,
        seed: int,
        to_seed: int,
        steps: int,
        label: int | None = None,
        truncation: float | None = None,
    ) -> np.ndarray:
        """The way from the first picture of `seed` to that of `to_seed`, both included, (steps, H, W, C) uint8.

        Args:
            seed, to_seed, truncation: as for `pictures`.
            steps: pictures, at least 2, at equal distances on the great circle.
            label: the class of all; without one, that of the first picture of `seed`.

        Raises:
            ValueError: a seed is out of range, there are fewer than 2 steps, or there is no such class.
        """
        if steps < 2:
            raise ValueError(f"steps is {steps}: ask for two pictures or more")
        first, last = (self._latents(end, 1, truncation)[0] for end in (seed, to_seed))
        labels = self.labels(seed, 1, label)
        return self.generate(walk(first, last, steps), None if labels is None else labels * steps)

    def _latents(self, seed: int, count: int, truncation: float | None) -> np.ndarray:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: use a number from 0 to 2**64 - 1")
        latents = seeded_latents(seed, count, self.latent_dim)
        return latents if truncation is None else truncated(latents, truncation)

    def labels(self, seed: int, count: int, label: int | None = None) -> list[int] | None:
        """The class of each of the pictures that `pictures` draws, None where the model has no classes."""
        if label is not None:
            return [label] * count
        return (
            [(seed + index) % self.num_classes for index in range(count)]
            if self.num_classes
            else None
        )

    def replay_golden(self) -> None:
        """Draws the pictures recorded at export again.

        Raises:
            ValueError: a picture is not as recorded.
        """
        golden = storage.read_json(self.folder / "golden.json")
        labels = golden["labels"]
        images = self.run(np.array(golden["latents"]), None if labels is None else np.array(labels))
        off = float(np.abs(images - np.array(golden["images"])).max())
        if not off <= IMAGE_TOLERANCE:
            raise ValueError(
                f"{self.folder} draws pictures {off:.2g} away from those golden.json recorded at its export: export the run again"
            )


Session = TypeVar("Session", TextSession, ImageSession)


def open_bundle(session_type: type[Session], uri: str, **options: Any) -> Session:
    """The session of the bundle at `uri`, wherever that is; hashes verified, golden answers replayed.

    Args:
        options: of the session: `slots`, `threads`, `providers`.

    Raises:
        ValueError: the bundle is damaged or of another kind, or does not answer as recorded.
    """
    with tempfile.TemporaryDirectory(prefix="raykiln-bundle-") as scratch:
        folder = storage.local_path(uri)
        if folder is None:
            storage.download(uri, scratch)
            folder = Path(scratch)
        session = session_type(folder, **options)
        session.replay_golden()
        return session


def _verified(folder: Path, kind: str) -> bundle.Manifest:
    manifest = bundle.verify(folder)
    if manifest["kind"] != kind:
        raise ValueError(f"{folder} is a {manifest['kind']} bundle where a {kind} bundle is needed")
    return manifest


def _sample(folder: Path, manifest: bundle.Manifest) -> bytes | None:
    """What the model made at its export, a text in UTF-8 or a PNG; None where the bundle has none."""
    name = bundle.SAMPLES[manifest["kind"]]
    return (folder / name).read_bytes() if name in manifest["files"] else None

"""A verified bundle in ONNX Runtime that generates text or images. No Ray, no torch, no HTTP."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from cluster import storage
from models import bundle
from models.images import to_pixels
from models.latents import seeded_latents, truncated, walk
from models.runtime import ImageGraph, TextGraph

# Of a golden image's values in [-1, 1]: a tenth of a gray level. CPUs round differently.
IMAGE_TOLERANCE = 1e-3


class TextSession(TextGraph):
    """A GPT bundle: `prefill` and `decode` over `slots` (see `models.runtime.TextGraph`).

    Args:
        folder: the bundle, on this machine.
        slots: sequences that can run at once.
        threads: CPU threads of one operator; one is best for tiny models.
        providers: names from `models.runtime.PROVIDERS`, best first; by default TensorRT, CUDA and
            CPU, as far as they are available.

    Raises:
        ValueError: the folder is not a GPT bundle, or one of its files is damaged.
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
        """Generate the text that was recorded at export again, in slot 0.

        Each recorded token must be the most likely one after its predecessors, or nearly as likely:
        another processor rounds differently, and each logit may be off by the export's tolerance.

        Raises:
            ValueError: ids, tokens or text differ from the recorded ones.
        """
        golden = storage.read_json(self.folder / "golden.json")
        ids, tokens = golden["ids"], golden["tokens"]
        self._compare("ids", ids, self.tokenizer.encode(golden["prompt"]).ids)
        self._compare("text", golden["text"], self.tokenizer.decode(tokens))
        expected = tokens if len(tokens) == golden["max_tokens"] else [*tokens, self.eos_token_id]
        for index, token in enumerate(expected):
            if index == 0:
                logits = self.prefill(0, ids)
            else:
                logits = self.decode([0], [expected[index - 1]], [len(ids) + index - 1])[0]
            # `not <=`, so that NaN fails.
            if not logits.max() - logits[token] <= 2 * self.manifest["parity"]["tolerance"]:
                self._compare("tokens", tokens, [*tokens[:index], int(logits.argmax())])

    def _compare(self, part: str, recorded: object, actual: object) -> None:
        if actual != recorded:
            raise ValueError(
                f"{self.folder} gives other {part} than golden.json recorded at its export "
                f"({actual!r}): export the run again"
            )


class ImageSession(ImageGraph):
    """A GAN bundle: images from latents or from a seed.

    Args:
        folder: the bundle, on this machine.
        threads: CPU threads of one operator.
        providers: as for `TextSession`.

    Raises:
        ValueError: the folder is not a GAN bundle, or one of its files is damaged.
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
        """Generate images from latents.

        Args:
            latents: (B, Z).
            labels: (B), required if the generator is conditional and invalid if it is not.

        Returns:
            (B, H, W, C) uint8.

        Raises:
            ValueError: labels are missing, superfluous, or not classes of the model.
        """
        if (labels is not None) != (self.num_classes > 0):
            needed = "be given" if self.num_classes else "be left out"
            raise ValueError(f"labels must {needed}: the model has {self.num_classes} classes")
        if labels is not None and not all(0 <= label < self.num_classes for label in labels):
            raise ValueError(
                f"labels are {list(labels)}: the model has the classes 0 to {self.num_classes - 1}"
            )
        images = self.run(latents, None if labels is None else np.asarray(labels))
        return to_pixels(images)

    def generate_from_seed(
        self, seed: int, count: int, label: int | None = None, truncation: float | None = None
    ) -> np.ndarray:
        """Generate the first `count` images of a seed; each is the same alone or in a batch.

        Args:
            seed: 0 to 2**64 - 1.
            label: the class of all images; by default, a conditional model cycles through its
                classes.
            truncation: where to truncate the latents' normal distribution
                (`models.latents.truncated`); None: no truncation.

        Returns:
            (count, H, W, C) uint8.

        Raises:
            ValueError: the seed is out of range, `count` is 0, or there is no such class.
        """
        if count < 1:
            raise ValueError(f"count is {count}: use 1 or more")
        return self.generate(
            self._latents(seed, count, truncation), self.labels(seed, count, label)
        )

    def interpolate(
        self,
        seed: int,
        to_seed: int,
        steps: int,
        label: int | None = None,
        truncation: float | None = None,
    ) -> np.ndarray:
        """Interpolate from the first image of `seed` to that of `to_seed`, both included.

        Args:
            seed, to_seed, truncation: as for `generate_from_seed`.
            steps: the number of images, at least 2, at equal distances on the great circle.
            label: the class of all images; by default that of the first image of `seed`.

        Returns:
            (steps, H, W, C) uint8.

        Raises:
            ValueError: a seed is out of range, `steps` is below 2, or there is no such class.
        """
        if steps < 2:
            raise ValueError(f"steps is {steps}: use 2 or more")
        first, last = (self._latents(end, 1, truncation)[0] for end in (seed, to_seed))
        labels = self.labels(seed, 1, label)
        return self.generate(walk(first, last, steps), None if labels is None else labels * steps)

    def labels(self, seed: int, count: int, label: int | None = None) -> list[int] | None:
        """Return the class of each image of `generate_from_seed`; None without classes."""
        if label is not None:
            return [label] * count
        if not self.num_classes:
            return None
        return [(seed + index) % self.num_classes for index in range(count)]

    def replay_golden(self) -> None:
        """Generate the images that were recorded at export again.

        Raises:
            ValueError: an image differs from the recorded one by more than `IMAGE_TOLERANCE`.
        """
        golden = storage.read_json(self.folder / "golden.json")
        labels = golden["labels"]
        images = self.run(np.array(golden["latents"]), None if labels is None else np.array(labels))
        difference = float(np.abs(images - np.array(golden["images"])).max())
        if not difference <= IMAGE_TOLERANCE:  # `not <=`, so that NaN fails
            raise ValueError(
                f"{self.folder} generates images that differ by {difference:.2g} from those "
                "golden.json recorded at its export: export the run again"
            )

    def _latents(self, seed: int, count: int, truncation: float | None) -> np.ndarray:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: use a number from 0 to 2**64 - 1")
        latents = seeded_latents(seed, count, self.latent_dim)
        return latents if truncation is None else truncated(latents, truncation)


Session = TypeVar("Session", TextSession, ImageSession)


def open_bundle(session_type: type[Session], uri: str, **options: object) -> Session:
    """Open the bundle at any URI; verify its hashes and replay its golden outputs.

    Args:
        options: of the session: `slots`, `threads`, `providers`.

    Raises:
        ValueError: the bundle is damaged or of another kind, or its outputs differ from the
            recorded ones.
    """
    with tempfile.TemporaryDirectory(prefix="raykiln-bundle-") as scratch:
        folder = storage.local_path(uri)
        if folder is None:
            storage.download(uri, scratch)
            folder = Path(scratch)
        session = session_type(folder, **options)  # type: ignore[arg-type]  # they differ by type
        session.replay_golden()
        return session


def _verified(folder: Path, kind: str) -> bundle.Manifest:
    manifest = bundle.verify(folder)
    if manifest["kind"] != kind:
        raise ValueError(f"{folder} is a {manifest['kind']} bundle where a {kind} bundle is needed")
    return manifest


def _sample(folder: Path, manifest: bundle.Manifest) -> bytes | None:
    """Return the sample in the bundle, a text in UTF-8 or a PNG; None if there is none."""
    name = bundle.SAMPLES[manifest["kind"]]
    return (folder / name).read_bytes() if name in manifest["files"] else None

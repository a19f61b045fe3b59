"""Export a DCGAN generator as an ONNX graph, checked against torch."""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from safetensors.torch import save_file

from cluster import storage
from models.bundle import ModelEntries, Parity
from models.images import contact_sheet, png, to_pixels
from models.latents import seeded_latents
from models.nets.dcgan import Generator
from models.runtime import ImageGraph, signature
from train.data.dataset import Dataset
from train.data.images import meta_of
from train.gan.config import GanConfig
from train.gan.trainer import net_config
from train.parallel.state import State
from train.parity import check_parity

OPSET = 20
MAX_BATCH = 1024
TOLERANCE = 1e-5  # of values in [-1, 1]
BATCHES = (1, 2, 3, 8)
GOLDEN_SEED, GOLDEN_IMAGES = 7, 2
SAMPLE_ROWS, SAMPLE_COLUMNS = 10, 8


class Golden(TypedDict):
    """The content of golden.json."""

    seed: int
    labels: list[int] | None
    latents: list[list[float]]
    images: list[list[list[list[float]]]]
    """(N, C, H, W), rounded to 5 decimals."""


def export_checkpoint(
    config: GanConfig, state: State, dataset: Dataset, folder: Path
) -> ModelEntries:
    """Write the bundle of a checkpoint's averaged generator. See `train.kinds.Kind.export`."""
    generator = Generator(net_config(config, dataset))
    generator.load_state_dict(dict(state["generator_ema"]))
    return export_gan(generator, meta_of(dataset)["classes"], folder)


def export_gan(generator: Generator, class_names: list[str], folder: Path) -> ModelEntries:
    """Write a GAN bundle's files, all but the manifest, into `folder`.

    Args:
        generator: float32, on the CPU, with the weights to serve (the averaged ones); it is put
            into eval mode.
        class_names: of a conditional generator, one per label; otherwise ignored.
        folder: exists and is empty.

    Returns:
        The manifest's `kind`, `inputs`, `outputs`, `opset`, `parity` and `model`.

    Raises:
        ValueError: the graph's images differ from torch's, or a class has no name.
    """
    config = generator.eval().config
    names = class_names if config.num_classes else []
    if len(names) != config.num_classes:
        raise ValueError(
            f"the generator has {config.num_classes} classes and the data set names {len(names)}: "
            "export with the run's own data set"
        )
    write_graph(generator, folder / "model.onnx")
    graph = ImageGraph(folder / "model.onnx")
    parity = measure_parity(generator, graph)
    weights = {name: tensor.contiguous() for name, tensor in generator.state_dict().items()}
    save_file(weights, folder / "generator.safetensors")
    storage.write_json(folder / "generator.json", asdict(config))
    storage.write_json(folder / "golden.json", _golden(generator, graph))
    _write_sample(generator, graph, folder / "sample.png")
    inputs, outputs = signature(graph.session)
    return {
        "kind": "gan",
        "inputs": inputs,
        "outputs": outputs,
        "opset": OPSET,
        "parity": parity,
        "model": {
            "latent_dim": config.latent_dim,
            "num_classes": config.num_classes,
            "class_names": names,
            "channels": config.channels,
            "image_size": config.image_size,
        },
    }


def write_graph(generator: Generator, path: Path) -> None:
    """Write the generator's graph, for any batch size up to `MAX_BATCH`."""
    config = generator.config
    batch = torch.export.Dim("B", min=1, max=MAX_BATCH)
    inputs: list[torch.Tensor] = [torch.zeros(2, config.latent_dim)]
    if config.num_classes:
        inputs.append(torch.zeros(2, dtype=torch.long))
    with warnings.catch_warnings():
        # Both inputs share the batch dimension, which torch warns about.
        warnings.filterwarnings(
            "ignore", message="# The axis name: B will not be used", category=UserWarning
        )
        program = torch.onnx.export(
            generator,
            tuple(inputs),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["latents", "labels"][: len(inputs)],
            output_names=["images"],
            dynamic_shapes=({0: batch},) * len(inputs),
        )
    assert program is not None
    program.save(path)


def measure_parity(generator: Generator, graph: ImageGraph) -> Parity:
    """Return the largest difference between the graph's images and torch's, for each batch size of
    `BATCHES`.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    differences = {}
    for batch in BATCHES:
        latents, labels = _inputs(generator, batch, batch)
        with torch.no_grad():
            expected = generator(
                torch.from_numpy(latents), None if labels is None else torch.from_numpy(labels)
            ).numpy()
        differences[f"batch {batch}"] = float(np.abs(graph.run(latents, labels) - expected).max())
    return check_parity(differences, TOLERANCE, "images")


def _inputs(generator: Generator, seed: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return seeded latents of `count` images and, of a conditional generator, the classes in
    turn."""
    latents = seeded_latents(seed, count, generator.config.latent_dim)
    num_classes = generator.config.num_classes
    return latents, np.arange(count) % num_classes if num_classes else None


def _golden(generator: Generator, graph: ImageGraph) -> Golden:
    latents, labels = _inputs(generator, GOLDEN_SEED, GOLDEN_IMAGES)
    images = graph.run(latents, labels)
    return {
        "seed": GOLDEN_SEED,
        "labels": None if labels is None else labels.tolist(),
        "latents": latents.tolist(),
        "images": np.round(images.astype(np.float64), 5).tolist(),
    }


def _write_sample(generator: Generator, graph: ImageGraph, path: Path) -> None:
    """Write a grid of images; of a conditional generator one class per row, one latent per
    column."""
    latent_dim = generator.config.latent_dim
    classes = min(generator.config.num_classes, SAMPLE_ROWS)
    if classes:
        latents = np.tile(seeded_latents(0, SAMPLE_COLUMNS, latent_dim), (classes, 1))
        labels = np.repeat(np.arange(classes), SAMPLE_COLUMNS)
    else:
        latents, labels = seeded_latents(0, SAMPLE_ROWS * SAMPLE_COLUMNS, latent_dim), None
    pixels = to_pixels(graph.run(latents, labels))
    sheet = contact_sheet(pixels, SAMPLE_COLUMNS, gutter=2, background=0)
    path.write_bytes(png(sheet))

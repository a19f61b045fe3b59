"""A DCGAN generator as an ONNX graph, checked against torch."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from models import storage
from models.dcgan import Generator
from models.runtime import ImageGraph, seeded_latents, signature

OPSET = 20
MAX_BATCH = 1024
TOLERANCE = 1e-5  # of values in [-1, 1]
BATCHES = (1, 2, 3, 8)
GOLDEN_SEED = 7
GOLDEN_PICTURES, SAMPLE_ROWS, SAMPLE_COLUMNS = 2, 8, 10


def export_gan(generator: Generator, class_names: list[str], folder: Path) -> dict[str, Any]:
    """Writes a GAN bundle's files (all but the manifest) into `folder`.

    Args:
        generator: float32, on the CPU, with the weights to serve (the averaged ones); it is put into eval mode.
        class_names: of a conditional generator, one for each label; else ignored.
        folder: exists and is empty.

    Returns:
        The manifest's `kind`, `inputs`, `outputs`, `opset`, `parity` and `model`.

    Raises:
        ValueError: the graph's pictures are not torch's, or a class has no name.
    """
    config = generator.eval().config
    names = class_names if config.num_classes else []
    if len(names) != config.num_classes:
        raise ValueError(
            f"the generator has {config.num_classes} classes and the data set names {len(names)}: export with the run's own data set"
        )
    write_graph(generator, folder / "model.onnx")
    graph = ImageGraph(folder / "model.onnx")
    parity = measure_parity(generator, graph)
    save_file({name: tensor.contiguous() for name, tensor in generator.state_dict().items()}, folder / "generator.safetensors")
    storage.write_json(folder / "generator.json", asdict(config))
    storage.write_json(folder / "golden.json", _golden(generator, graph))
    _write_sample(generator, graph, folder / "sample.png")
    inputs, outputs = signature(graph.session)
    shape = {
        "latent_dim": config.latent_dim,
        "num_classes": config.num_classes,
        "class_names": names,
        "channels": config.channels,
        "image_size": config.image_size,
    }
    return {"kind": "gan", "inputs": inputs, "outputs": outputs, "opset": OPSET, "parity": parity, "model": shape}


def write_graph(generator: Generator, path: Path) -> None:
    """Exports the generator for any batch up to `MAX_BATCH`."""
    config = generator.config
    batch = torch.export.Dim("B", min=1, max=MAX_BATCH)
    inputs: list[torch.Tensor] = [torch.zeros(2, config.latent_dim)]
    if config.num_classes:
        inputs.append(torch.zeros(2, dtype=torch.long))
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


def measure_parity(generator: Generator, graph: ImageGraph) -> dict[str, Any]:
    """The largest difference between the graph's pictures and torch's, over batches of `BATCHES`.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    cases = []
    for batch in BATCHES:
        latents, labels = _inputs(generator, batch, batch)
        with torch.no_grad():
            expected = generator(torch.from_numpy(latents), None if labels is None else torch.from_numpy(labels)).numpy()
        cases.append({"name": f"batch {batch}", "max_abs_diff": float(np.abs(graph.run(latents, labels) - expected).max())})
    worst = max(cases, key=lambda case: case["max_abs_diff"])
    if not worst["max_abs_diff"] <= TOLERANCE:
        raise ValueError(
            f"the exported graph's pictures are {worst['max_abs_diff']:.2g} from torch's ({worst['name']}), more than {TOLERANCE:.2g}: "
            "nothing is published; check the versions of torch, onnxscript and onnxruntime against requirements.lock"
        )
    return {"max_abs_diff": worst["max_abs_diff"], "tolerance": TOLERANCE, "cases": cases}


def _inputs(generator: Generator, seed: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The seeded latents of `count` pictures, and the classes in turn where the generator takes one."""
    classes = generator.config.num_classes
    return seeded_latents(seed, count, generator.config.latent_dim), np.arange(count) % classes if classes else None


def _golden(generator: Generator, graph: ImageGraph) -> dict[str, Any]:
    latents, labels = _inputs(generator, GOLDEN_SEED, GOLDEN_PICTURES)
    images = graph.run(latents, labels)
    return {
        "seed": GOLDEN_SEED,
        "labels": None if labels is None else labels.tolist(),
        "latents": latents.tolist(),
        "images": np.round(images.astype(np.float64), 5).tolist(),
    }


def _write_sample(generator: Generator, graph: ImageGraph, path: Path) -> None:
    """A grid of pictures; the columns of a conditional generator are its first classes."""
    config = generator.config
    columns = min(config.num_classes, SAMPLE_COLUMNS) or SAMPLE_COLUMNS
    latents = seeded_latents(0, SAMPLE_ROWS * columns, config.latent_dim)
    labels = np.tile(np.arange(columns), SAMPLE_ROWS) if config.num_classes else None
    images = graph.run(latents, labels).reshape(SAMPLE_ROWS, columns, config.channels, config.image_size, config.image_size)
    grid = np.rint((images + 1) * 127.5).astype(np.uint8).transpose(0, 3, 1, 4, 2)  # (rows, H, columns, W, C)
    grid = grid.reshape(SAMPLE_ROWS * config.image_size, columns * config.image_size, config.channels)
    Image.fromarray(grid.squeeze(2) if config.channels == 1 else grid).save(path)

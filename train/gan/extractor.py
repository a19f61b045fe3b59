"""Trains a data set's extractor once and keeps it beside the data: `python -m train extractor --config gan-fashion`.

    dataset = prepare(config, dataset)              # on the driver: found, shipped, or trained
    extractor = load(dataset.extractor["uri"], device)     # on each worker

What it learns is to tell the data set's classes apart; where there are none, how far a picture was turned (Gidaris et al.
2018, https://arxiv.org/abs/1803.07728), and clusters of its features then stand for the modes (Richardson & Weiss 2018,
https://arxiv.org/abs/1805.12462). Its file is named by its hash: complete and undamaged, or it does not exist.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from cluster import storage
from cluster.connect import connect
from models.nets.features import Extractor, ExtractorConfig
from train.data.dataset import Dataset
from train.data.images import Images
from train.data.order import Order, rng
from train.data.shipped.files import shipped
from train.gan.config import GanConfig

VERSION = 1  # part of the file's name: raise it when the net or its training changes
SEED = 0  # not the run's: all runs on a data set are judged by the same extractor
BATCH = 128
EPOCHS, MIN_STEPS, MAX_STEPS = 20, 200, 3000
LR, WEIGHT_DECAY = 3e-3, 0.05
TURNS, SHIFT, CLUSTERS = 8, 9, 10  # purposes of random draws: what sets their keys apart
PICTURES_PER_MODE, MAX_MODES = 50, 40
MIN_PICTURES = 10


@dataclass(frozen=True)
class Card:
    """What an extractor's file says of it."""

    task: str
    """What it was trained on: "classes" or "rotations" (by 0, 90, 180, 270 degrees)."""
    accuracy: float
    """The share of `heldout` pictures, never trained on, that it gets right."""
    heldout: int
    train: int
    """Images that it was trained on."""
    classes: list[str]
    dataset: str
    """The fingerprint of the data set that it was trained on."""


# ---------------------------------------------------------------- finding


def prepare(config: GanConfig, dataset: Dataset, say: Callable[[str], None] = print) -> Dataset:
    """Return the data set with the extractor that evaluates images of it; train one where there is
    none yet.

    Quick where it is there already, or the data are the shipped ones, whose extractor ships too.

    Args:
        config: the run's; its GPU, or as many CPUs as its workers have, train.
        dataset: a prepared data set; the extractor lies in its folder.
        say: takes a line on what is done.

    Raises:
        ValueError: it is damaged, or the data set is too small to judge by.
    """
    meta = dataset.meta
    _refuse_too_few(meta["splits"], dataset.uri)
    found = find(dataset.uri, config.data.size)
    if found is None and meta["source"] == ["fashion-mnist"]:
        shipped_file = shipped("fashion-mnist-extractor.safetensors").read_bytes()
        found = publish(shipped_file, dataset.uri, config.data.size)
    if found is None:
        say(
            f"extractor: training on {meta['splits']['train']['images']:,} images, once for this data set"
        )
        found = _train_on_cluster(config, dataset)
    say(f"extractor {found[-24:-12]}: {describe(read(found)[1])}: {found}")
    return dataset.with_extractor(facts(found))


def find(dataset: str, size: int) -> str | None:
    """The extractor that lies beside a data set whose pictures are seen with `size` pixels a side, None where there is none."""
    names = [
        name
        for name in storage.names(dataset)
        if name.startswith(_stem(size)) and name.endswith(".safetensors")
    ]
    return storage.join(dataset, names[0]) if names else None


def describe(card: Card) -> str:
    """An extractor's accuracy in words."""
    what = f"{len(card.classes)} classes" if card.task == "classes" else "4 rotations"
    return f"tells {what} apart, {card.accuracy:.1%} of {card.heldout:,} held-out pictures right"


def _stem(size: int) -> str:
    return f"extractor-v{VERSION}-{size}px-"


def _refuse_too_few(splits: dict[str, dict[str, int]], dataset: str) -> None:
    for split, facts in splits.items():
        if facts["images"] < MIN_PICTURES:
            raise ValueError(
                f"{dataset} has {facts['images']} images in its {split} split, and generated ones can't be judged by fewer than {MIN_PICTURES}: "
                "give more pictures in data.source, or another data.heldout_fraction"
            )


# ---------------------------------------------------------------- files


def pack(extractor: Extractor, card: Card) -> bytes:
    """An extractor's file: safetensors with its config and card in the header."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in extractor.state_dict().items()}
    about = {"config": asdict(extractor.config), "card": asdict(card)}
    return save(
        tensors, {"extractor": json.dumps(about)}
    )  # one key: safetensors would shuffle several


def publish(content: bytes, dataset: str, size: int) -> str:
    """Writes an extractor's file beside its data set, under its hash; returns its URI."""
    uri = storage.join(dataset, f"{_stem(size)}{fingerprint(content)}.safetensors")
    storage.write_bytes(uri, content)
    return uri


def facts(uri: str) -> dict[str, Any]:
    """What a run's lineage says of its extractor: uri, sha256 and all of its `Card`."""
    content = _content(uri)
    return {
        "uri": uri,
        "sha256": hashlib.sha256(content).hexdigest(),
        **asdict(unpack(content, uri)[1]),
    }


def fingerprint(content: bytes) -> str:
    """The first 12 hex digits of the sha256."""
    return hashlib.sha256(content).hexdigest()[:12]


def read(uri: str) -> tuple[Extractor, Card]:
    """An extractor, in eval mode on the CPU, and what its file says of it.

    Raises:
        ValueError: the file is missing, or not what its name promises.
    """
    return unpack(_content(uri), uri)


def _content(uri: str) -> bytes:
    """The bytes of an extractor's file, which are those that its name promises."""
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        raise ValueError(
            f"{uri} is missing: start the run again, and the extractor will be trained again"
        ) from None
    if not uri.endswith(f"-{fingerprint(content)}.safetensors"):
        raise ValueError(
            f"{uri} is damaged (its sha256 is not the one in its name): delete it, and the extractor will be trained again"
        )
    return content


def unpack(content: bytes, where: str) -> tuple[Extractor, Card]:
    """What `pack` has packed.

    Raises:
        ValueError: it is no extractor's file, or one of another version; names `where`.
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
            f"{where} is no extractor of this version ({problem}): delete it, and one will be trained"
        ) from None


def load(uri: str, device: torch.device | str) -> Extractor:
    """The extractor in eval mode on `device`; see `read`."""
    return read(uri)[0].to(device)


# ---------------------------------------------------------------- training


def _train_on_cluster(config: GanConfig, dataset: Dataset) -> str:
    """Trains as a task where the run's workers will be, which have not started yet: with their CPUs as far as one node has them."""
    connect()
    parallel = config.parallel
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max(
        (node.get("CPU", 0) for node in nodes if node.get("GPU", 0) >= parallel.gpu), default=0
    )
    cpus = max(parallel.cpus_per_worker, min(parallel.workers * parallel.cpus_per_worker, largest))
    task = ray.remote(num_cpus=cpus, num_gpus=int(parallel.gpu))(_task)
    try:
        found = ray.get(
            task.remote(
                dataset, config.data.size, max(1, int(cpus)), "cuda" if parallel.gpu else "cpu"
            )
        )
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # its sentence, without the task's traceback around it
    return (
        find(dataset.uri, config.data.size) or found
    )  # another driver's, where that is found first


def _task(dataset: Dataset, size: int, threads: int, device: str) -> str:
    torch.set_num_threads(threads)
    return publish(pack(*train(dataset, size, device)), dataset.uri, size)


def train(
    dataset: Dataset, size: int, device: torch.device | str = "cpu", steps: int | None = None
) -> tuple[Extractor, Card]:
    """The extractor of a prepared data set on this machine; on a CPU with as many threads the same one each time.

    Args:
        dataset: a prepared data set of images.
        size: pixels a side that the generator's pictures have.
        device: where to train.
        steps: batches of BATCH pictures, or of all where they are fewer; by default EPOCHS over the training pictures, within MIN_STEPS and MAX_STEPS.
    """
    pictures = Images(dataset, "train", size, horizontal_flip=True)
    heldout = Images(dataset, "heldout", size)
    classes = pictures.meta["classes"]
    telling = len(classes) > 1  # one class is nothing to tell apart
    config = ExtractorConfig(
        size=32 if size <= 32 else 64,
        channels=pictures.meta["channels"],
        num_classes=len(classes) if telling else 4,
        num_modes=0 if telling else min(max(len(heldout) // PICTURES_PER_MODE, 2), MAX_MODES),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        extractor = (
            Extractor(config).to(device).to(memory_format=torch.channels_last)
        )  # about a third faster on a CPU
    _fit(
        extractor,
        pictures,
        telling,
        steps or min(max(EPOCHS * len(pictures) // _batch_size(pictures), MIN_STEPS), MAX_STEPS),
    )
    extractor.eval().requires_grad_(False)
    if not telling:
        sample = rng(len(pictures), CLUSTERS).permutation(len(pictures))[
            : PICTURES_PER_MODE * MAX_MODES
        ]
        features = torch.cat(
            [extractor.features(images) for images, _ in batches(pictures, device, sample)]
        )
        extractor.centroids.copy_(clusters(features, config.num_modes))
    accuracy = measure(extractor, heldout, telling)
    task = "classes" if telling else "rotations"
    return extractor, Card(
        task, accuracy, len(heldout), len(pictures), classes, pictures.meta["fingerprint"]
    )


def _batch_size(pictures: Images) -> int:
    return min(BATCH, len(pictures))


def _fit(extractor: Extractor, pictures: Images, telling: bool, steps: int) -> None:
    """Trains in place: AdamW under one cycle of the learning rate, on pictures mirrored and shifted a little."""
    optimizer = torch.optim.AdamW(extractor.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    order, size = Order(len(pictures), SEED), _batch_size(pictures)
    device = extractor.head.weight.device
    for step in range(steps):
        places = np.arange(step * size, (step + 1) * size)
        pixels, labels = pictures.batch(order, places)
        images = _shifted(torch.from_numpy(pixels).to(device), rng(SEED, step, SHIFT))
        if not telling:
            labels = rng(SEED, step, TURNS).integers(4, size=size)
            images = turned(images, labels)
        assert labels is not None
        loss = functional.cross_entropy(extractor(images), torch.from_numpy(labels).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _shifted(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Images (B, C, H, W) moved by up to a sixteenth of their size, all of a batch alike; the edge is repeated."""
    size = images.shape[-1]
    most = size // 16
    top, left = draw.integers(2 * most + 1, size=2)
    return functional.pad(images, [most] * 4, mode="replicate")[
        :, :, top : top + size, left : left + size
    ]


def turned(images: Tensor, turns: np.ndarray) -> Tensor:
    """Images (B, C, H, H), each by its own number of right angles (B)."""
    return torch.stack(
        [image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)]
    )


def batches(
    pictures: Images, device: torch.device | str, indices: np.ndarray | None = None
) -> list[tuple[Tensor, np.ndarray]]:
    """Images without augmentation and their indices, batch by batch; by default all."""
    wanted = np.arange(len(pictures)) if indices is None else indices
    parts = np.array_split(wanted, -(-len(wanted) // BATCH))
    return [(torch.from_numpy(pictures.centered(part)).to(device), part) for part in parts]


@torch.no_grad()
def measure(extractor: Extractor, heldout: Images, telling: bool) -> float:
    """The share of pictures whose class, or else whose turn, the extractor tells right."""
    right = 0
    for images, part in batches(heldout, extractor.head.weight.device):
        answers = heldout.labels[part] if telling and heldout.labels is not None else part % 4
        found = extractor(images if telling else turned(images, answers)).argmax(dim=1)
        right += int((found.cpu() == torch.from_numpy(answers)).sum())
    return right / len(heldout)


def clusters(features: Tensor, count: int) -> Tensor:
    """The means (count, D) of k-means over features (N, D): Lloyd's, from k-means++ (Arthur & Vassilvitskii 2007)."""
    draw = rng(len(features), count, CLUSTERS)
    means = features[int(draw.integers(len(features)))][None]
    while len(means) < count:
        weights = torch.cdist(features, means).min(dim=1).values.double().square().cpu().numpy()
        chosen = draw.choice(len(features), p=weights / weights.sum()) if weights.any() else 0
        means = torch.cat([means, features[chosen][None]])
    for _ in range(100):
        nearest = torch.cdist(features, means).argmin(dim=1)
        moved = torch.stack(
            [
                features[nearest == i].mean(dim=0) if (nearest == i).any() else means[i]
                for i in range(count)
            ]
        )
        if torch.equal(moved, means):
            break
        means = moved
    return means

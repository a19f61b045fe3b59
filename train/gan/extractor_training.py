"""Train a data set's feature extractor.

It learns to classify the data set's classes. Where there are none, it learns how far an image was
rotated (Gidaris et al. 2018, https://arxiv.org/abs/1803.07728), and clusters of its features stand
for the modes (Richardson & Weiss 2018, https://arxiv.org/abs/1805.12462).
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.nets.features import Extractor, ExtractorConfig
from train.data.dataset import Dataset
from train.data.images import Images
from train.data.order import Order, rng
from train.gan.extractor_file import Card, Task

SEED = 0  # not the run's: the same extractor evaluates all runs on a data set
BATCH = 128
EPOCHS, MIN_STEPS, MAX_STEPS = 20, 200, 3000
LR, WEIGHT_DECAY = 3e-3, 0.05
ROTATION, SHIFT, CLUSTERS = 8, 9, 10  # purposes of random draws, which set their keys apart
IMAGES_PER_MODE, MAX_MODES = 50, 40


def train(
    dataset: Dataset, size: int, device: torch.device | str = "cpu", steps: int | None = None
) -> tuple[Extractor, Card]:
    """Train an extractor on this machine.

    On a CPU, the same number of threads gives the same extractor.

    Args:
        dataset: a prepared data set of images.
        size: pixels per side of the generator's images.
        device: where to train.
        steps: the number of batches, of `BATCH` images or of all where there are fewer; by default
            those of `EPOCHS` epochs, within `MIN_STEPS` and `MAX_STEPS`.

    Returns:
        The extractor in eval mode, and its card.
    """
    images = Images(dataset, "train", size, horizontal_flip=True)
    heldout = Images(dataset, "heldout", size)
    classes = images.meta["classes"]
    task: Task = "classes" if len(classes) > 1 else "rotations"  # one class teaches nothing
    num_modes = min(max(len(heldout) // IMAGES_PER_MODE, 2), MAX_MODES)
    config = ExtractorConfig(
        size=32 if size <= 32 else 64,
        channels=images.meta["channels"],
        num_classes=len(classes) if task == "classes" else 4,
        num_modes=0 if task == "classes" else num_modes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        extractor = Extractor(config).to(device)
    extractor.to(memory_format=torch.channels_last)  # about a third faster on a CPU
    all_epochs = EPOCHS * len(images) // _batch_size(images)
    _fit(extractor, images, task, steps or min(max(all_epochs, MIN_STEPS), MAX_STEPS))
    extractor.eval().requires_grad_(False)
    if config.num_modes:
        extractor.centroids.copy_(_centroids(extractor, images))
    card = Card(
        task=task,
        accuracy=accuracy(extractor, heldout, task),
        heldout=len(heldout),
        train=len(images),
        classes=classes,
        dataset=images.meta["fingerprint"],
    )
    return extractor, card


def _batch_size(images: Images) -> int:
    return min(BATCH, len(images))


def _fit(extractor: Extractor, images: Images, task: Task, steps: int) -> None:
    """Train in place with AdamW and one cycle of the learning rate, on images that are mirrored and
    shifted a little."""
    optimizer = torch.optim.AdamW(extractor.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    order, size = Order(len(images), SEED), _batch_size(images)
    device = extractor.head.weight.device
    for step in range(steps):
        positions = np.arange(step * size, (step + 1) * size)
        pixels, labels = images.batch(order, positions)
        batch = _shift(torch.from_numpy(pixels).to(device), rng(SEED, step, SHIFT))
        if task == "rotations":
            labels = rng(SEED, step, ROTATION).integers(4, size=size)
            batch = rotate(batch, labels)
        assert labels is not None
        loss = functional.cross_entropy(extractor(batch), torch.from_numpy(labels).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _shift(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Shift images (B, C, H, H) by up to a sixteenth of their size, all alike; repeat the edge."""
    size = images.shape[-1]
    most = size // 16
    top, left = draw.integers(2 * most + 1, size=2)
    padded = functional.pad(images, [most] * 4, mode="replicate")
    return padded[:, :, top : top + size, left : left + size]


def rotate(images: Tensor, turns: np.ndarray) -> Tensor:
    """Rotate each of the images (B, C, H, H) by its number of right angles (B)."""
    return torch.stack(
        [image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)]
    )


@torch.no_grad()
def accuracy(extractor: Extractor, heldout: Images, task: Task) -> float:
    """Return the fraction of images whose class, or whose rotation, the extractor predicts."""
    correct = 0
    for indices in _batches(np.arange(len(heldout))):
        batch = _centered(extractor, heldout, indices)
        if task == "classes":
            assert heldout.labels is not None
            labels = heldout.labels[indices]
        else:
            labels = indices % 4
            batch = rotate(batch, labels)
        predicted = extractor(batch).argmax(dim=1).cpu()
        correct += int((predicted == torch.from_numpy(labels)).sum())
    return correct / len(heldout)


def _centroids(extractor: Extractor, images: Images) -> Tensor:
    """Return the centers (num_modes, D) of the clusters that features of training images form."""
    order = rng(len(images), CLUSTERS).permutation(len(images))
    features = [
        extractor.features(_centered(extractor, images, indices))
        for indices in _batches(order[: IMAGES_PER_MODE * MAX_MODES])
    ]
    return kmeans(torch.cat(features), extractor.config.num_modes)


def _batches(indices: np.ndarray) -> list[np.ndarray]:
    return np.array_split(indices, -(-len(indices) // BATCH))


def _centered(extractor: Extractor, images: Images, indices: np.ndarray) -> Tensor:
    """Return images (B, C, H, W) without augmentation, on the extractor's device."""
    return torch.from_numpy(images.centered(indices)).to(extractor.head.weight.device)


def kmeans(features: Tensor, count: int) -> Tensor:
    """Return the means of k-means: Lloyd's algorithm, started by k-means++ (Arthur & Vassilvitskii
    2007).

    Args:
        features: (N, D).
        count: the number of clusters.

    Returns:
        (count, D).
    """
    draw = rng(len(features), count, CLUSTERS)
    means = features[int(draw.integers(len(features)))][None]
    while len(means) < count:
        weights = torch.cdist(features, means).min(dim=1).values.double().square().cpu().numpy()
        # All weights are 0 where there are fewer different points than clusters.
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

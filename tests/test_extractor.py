"""The feature extractor: its network, the shipped one, its training, and its file."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from cluster import cli, storage
from models.nets.features import MIN_CONFIDENCE, Extractor, ExtractorConfig
from train.config.data import ImageData
from train.data import images
from train.data.dataset import Dataset
from train.data.images import Images
from train.data.shipped.files import shipped
from train.data.shipped.make import GARMENTS
from train.gan import extractor, extractor_file, extractor_training
from train.gan.config import GanConfig

SHIPPED = "fashion-mnist-extractor.safetensors"


def config_of(*source: str, **more: object) -> GanConfig:
    return GanConfig.model_validate(
        {"data": {"source": list(source or ("fashion-mnist",)), **more}}
    )


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The shipped images, prepared with 32 pixels per side."""
    return images.prepare(ImageData(), str(tmp_path_factory.mktemp("kiln")))


@pytest.fixture(scope="module")
def shipped_net() -> Extractor:
    return extractor_file.unpack(shipped(SHIPPED).read_bytes(), SHIPPED)[0]


@pytest.fixture
def few(tmp_path: Path) -> str:
    """A parquet file of 20 garments, 2 per class, one of each held out."""
    file = tmp_path / "few.parquet"
    table = pq.read_table(shipped("fashion-mnist.parquet"))
    splits = pa.array(["heldout"] * 10 + ["train"] * 10)
    pq.write_table(table.slice(0, 20).set_column(3, "split", splits), file)
    return str(file)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("trains an extractor although there is one")

    monkeypatch.setattr(extractor, "_train_on_cluster", refuse)


def prepared_uri(config: GanConfig, dataset: Dataset) -> str:
    """The URI of the extractor that `prepare` adds to the data set."""
    found = extractor.prepare(config, dataset, cli.no_log).extractor
    assert found is not None
    return str(found["uri"])


# ---- the network


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("own_size", [32, 64])
@pytest.mark.parametrize("size", [28, 32, 64, 128])
def test_images_of_any_size_have_features(size: int, own_size: int, channels: int) -> None:
    torch.manual_seed(0)
    net = Extractor(ExtractorConfig(size=own_size, channels=channels, num_classes=7)).eval()
    again = Extractor(ExtractorConfig(**json.loads(json.dumps(asdict(net.config))))).eval()
    again.load_state_dict(net.state_dict())
    batch = torch.rand(3, channels, size, size) * 2 - 1
    features = net.features(batch)
    assert (features.shape, features.dtype) == ((3, net.config.num_features), torch.float32)
    assert net(batch).shape == (3, 7)
    assert torch.equal(again.features(batch), features)
    assert torch.allclose(net.features(batch[1:2]), features[1:2], atol=1e-6), (
        "an image's features do not depend on the rest of the batch"
    )


def test_invalid_config_is_refused() -> None:
    for wrong in ({"size": 48}, {"channels": 2}, {"num_classes": 0}):
        with pytest.raises(ValueError, match="extractor"):
            ExtractorConfig(**wrong)


def test_modes_are_confidently_predicted_classes_or_the_nearest_clusters() -> None:
    net = Extractor(ExtractorConfig(num_classes=3, width=2))
    with torch.no_grad():
        net.head.weight.copy_(torch.eye(3, 4))
        net.head.bias.zero_()
    logits = torch.log(torch.tensor([MIN_CONFIDENCE, MIN_CONFIDENCE])) - torch.log1p(
        -torch.tensor([MIN_CONFIDENCE, MIN_CONFIDENCE])
    )
    # Two other classes share the remaining probability, which adds log 2.
    sure, unsure = logits + torch.tensor([0.8, 0.6])
    features = torch.tensor([[0, float(sure), 0, 9], [0, 0, float(unsure), 9]])
    probability = net.head(features).softmax(dim=1).max(dim=1).values
    assert probability[0] > MIN_CONFIDENCE > probability[1]
    assert net.modes(features).tolist() == [1, -1]
    clustered = Extractor(ExtractorConfig(num_classes=4, num_modes=2, width=2))
    clustered.centroids.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]]))
    assert clustered.modes(torch.tensor([[0.9, 0.9, 0.9, 0], [0.2, 0, 0, 0.1]])).tolist() == [1, 0]


# ---- the shipped one


@pytest.mark.parametrize("size", [28, 32, 64, 128])
def test_shipped_extractor_classifies_unseen_garments(
    size: int, tmp_path: Path, shipped_net: Extractor
) -> None:
    """It was trained on none of the shipped images; it resizes images of any size to its own."""
    dataset = images.prepare(ImageData.model_validate({"size": size}), str(tmp_path))
    heldout = Images(dataset, "heldout", size)
    assert extractor_training.accuracy(shipped_net, heldout, "classes") >= 0.9


def test_shipped_extractor_was_trained_on_neither_split(
    garments: Dataset, shipped_net: Extractor
) -> None:
    accuracies = []
    for split in ("train", "heldout"):
        side = Images(garments, split, 32)
        assert side.labels is not None
        batch = torch.from_numpy(side.centered(slice(0, 1000)))
        predicted = shipped_net(batch).argmax(dim=1).numpy()
        accuracies.append((predicted == side.labels[:1000]).mean())
    assert abs(accuracies[0] - accuracies[1]) < 0.02, "it is better on images it was trained on"


def test_shipped_extractor_has_a_card() -> None:
    content = shipped(SHIPPED).read_bytes()
    net, card = extractor_file.unpack(content, SHIPPED)
    assert len(content) < 2_000_000
    assert (card.task, card.classes) == ("classes", GARMENTS)
    assert (card.train, card.heldout) == (45_000, 5_000)
    assert card.accuracy >= 0.9
    assert not net.training
    assert net.config.num_modes == 0


@pytest.mark.usefixtures("no_training")
def test_shipped_data_use_the_shipped_extractor(tmp_path: Path) -> None:
    said: list[str] = []
    for size in (28, 32):
        config = config_of(size=size)
        dataset = images.prepare(config.data, str(tmp_path))
        entry = extractor.prepare(config, dataset, said.append).extractor
        assert entry is not None
        assert storage.read_bytes(entry["uri"]) == shipped(SHIPPED).read_bytes()
        assert entry["uri"].startswith(dataset.uri)
        assert extractor.prepare(config, dataset, said.append).extractor == entry
        assert entry["sha256"] == storage.sha256(shipped(SHIPPED))
        assert entry["accuracy"] >= 0.9
        assert entry == extractor_file.lineage_entry(entry["uri"])
    assert len(said) == 4
    assert "10 classes, 9" in said[0]


# ---- training


def test_training_learns_and_is_deterministic(garments: Dataset) -> None:
    state = torch.get_rng_state()
    content = extractor_file.pack(*extractor_training.train(garments, 32, steps=20))
    assert extractor_file.pack(*extractor_training.train(garments, 32, steps=20)) == content
    assert torch.equal(torch.get_rng_state(), state), "it does not change the caller's random state"
    net, card = extractor_file.unpack(content, "trained")
    assert card.accuracy > 0.5, "chance is a tenth"
    heldout = Images(garments, "heldout", 32)
    assert card.accuracy == extractor_training.accuracy(net, heldout, "classes")
    assert (card.task, card.train, card.heldout) == ("classes", 9000, 1000)
    assert card.dataset == garments.fingerprint


def test_without_classes_training_learns_rotations_and_clusters(tmp_path: Path) -> None:
    table = pq.read_table(shipped("fashion-mnist.parquet"), columns=["image", "split"])
    pq.write_table(table, tmp_path / "plain.parquet")
    dataset = images.prepare(ImageData(source=[str(tmp_path / "plain.parquet")]), str(tmp_path))
    net, card = extractor_training.train(dataset, 32, steps=20)
    assert (card.task, card.classes) == ("rotations", [])
    assert card.accuracy > 0.4, "chance is a quarter"
    assert net.config.num_classes == 4
    assert net.config.num_modes == 20
    train = Images(dataset, "train", 32)
    modes = net.modes(net.features(torch.from_numpy(train.centered(slice(0, 1000)))))
    assert len(modes.unique()) == 20


def test_rotate_turns_each_image_by_its_own_angle() -> None:
    batch = torch.arange(4.0).reshape(1, 1, 2, 2).expand(4, 1, 2, 2)
    expected = [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    assert extractor_training.rotate(batch, np.arange(4)).flatten(1).tolist() == expected


def test_kmeans_finds_the_means_of_separate_clusters() -> None:
    draw = np.random.default_rng(0)
    centers = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    noise = torch.from_numpy(draw.normal(0, 0.5, (3, 50, 2)).astype(np.float32))
    points = (centers[:, None] + noise).reshape(-1, 2)
    means = extractor_training.kmeans(points, 3)
    assert torch.allclose(means[means.sum(dim=1).argsort()][0], points[:50].mean(dim=0), atol=1e-5)
    assert {tuple(row) for row in means.div(10).round().int().tolist()} == {(0, 0), (1, 0), (0, 1)}
    same = extractor_training.kmeans(torch.ones(20, 2), 3)
    assert torch.equal(same, torch.ones(3, 2)), "more clusters than different points"


@pytest.mark.usefixtures("ray_address")
def test_other_data_train_an_extractor_once_on_the_cluster(
    few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    config = config_of(few, size=28)
    dataset = images.prepare(config.data, str(tmp_path / "kiln"))
    entry = extractor.prepare(config, dataset, said.append).extractor
    assert entry is not None
    uri = entry["uri"]
    _, card = extractor_file.read(uri)
    assert (card.task, card.train, card.heldout) == ("classes", 10, 10)
    assert said[0] == "extractor: training on 10 images, once for this data set"
    assert said[1].startswith(f"extractor {Path(uri).stem[-12:]}: 10 classes, ")
    assert len(said) == 2
    monkeypatch.setattr(extractor, "_train_on_cluster", None)
    assert extractor.prepare(config, dataset, said.append).extractor == entry
    assert extractor_file.load(uri, "cpu").config.size == 32


@pytest.mark.usefixtures("ray_address")
def test_failure_on_the_cluster_is_one_line(few: str, tmp_path: Path) -> None:
    config = config_of(few)
    dataset = images.prepare(config.data, str(tmp_path / "kiln"))
    file = Path(dataset.uri) / "train.npy"
    file.write_bytes(file.read_bytes()[:-1])
    message = r"^\S*train\.npy is missing or truncated: delete \S+ and it will be prepared again$"
    with pytest.raises(ValueError, match=message):
        extractor.prepare(config, dataset)


# ---- the file


@pytest.fixture(params=["folder", "s3"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """What `prepare` reads of the shipped images' data set, on a disk and on an object store."""
    uri = str(tmp_path)
    if request.param == "s3":
        uri = f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    splits = {split: {"images": 1000} for split in ("train", "heldout")}
    return Dataset.write(uri, {"source": ["fashion-mnist"], "splits": splits})


@pytest.mark.usefixtures("no_training")
def test_damaged_file_is_refused_until_it_is_deleted(dataset: Dataset) -> None:
    uri = prepared_uri(config_of(), dataset)
    content = storage.read_bytes(uri)
    flipped = bytearray(content)
    flipped[-100] ^= 1
    message = (
        r"px-[0-9a-f]{12}\.safetensors is damaged .*: delete it, and the extractor will be trained"
    )
    for damaged in (bytes(flipped), content[:-1], b""):
        storage.write_bytes(uri, damaged)
        with pytest.raises(ValueError, match=message):
            extractor.prepare(config_of(), dataset)
        with pytest.raises(ValueError, match=message):
            extractor_file.load(uri, "cpu")
    storage.delete(uri)
    with pytest.raises(ValueError, match="is missing: start the run again"):
        extractor_file.load(uri, "cpu")
    assert prepared_uri(config_of(), dataset) == uri
    assert storage.read_bytes(uri) == content


@pytest.mark.usefixtures("no_training")
def test_partially_written_file_is_ignored(dataset: Dataset) -> None:
    partial = "extractor-v1-32px-0123456789ab.safetensors.5d41.tmp"
    storage.write_bytes(storage.join(dataset.uri, partial), b"half")
    assert extractor_file.find(dataset.uri, 32) is None
    uri = prepared_uri(config_of(), dataset)
    assert extractor_file.find(dataset.uri, 32) == uri
    assert extractor_file.find(dataset.uri, 64) is None


def test_file_of_another_kind_or_version_is_refused() -> None:
    message = r"^here is not an extractor of this version .*: delete it"
    with pytest.raises(ValueError, match=message):
        extractor_file.unpack(save({"weight": torch.zeros(2)}), "here")
    net = Extractor(ExtractorConfig(width=4))
    wider = save(net.state_dict(), {"extractor": json.dumps({"config": {"width": 8}, "card": {}})})
    with pytest.raises(ValueError, match=message):
        extractor_file.unpack(wider, "here")


@pytest.mark.usefixtures("no_training")
def test_data_set_too_small_for_an_evaluation_is_refused(dataset: Dataset) -> None:
    splits = {**dataset.meta["splits"], "heldout": {"images": 9}}
    few = replace(dataset, uri="few", meta={**dataset.meta, "splits": splits})
    message = r"few has 9 images in its heldout split, and .* at least 10: give more"
    with pytest.raises(ValueError, match=message):
        extractor.prepare(config_of(), few)


def test_command_prints_the_extractor(command: Callable, tmp_path: Path) -> None:
    arguments = ("--config", "gan-tiny", "--storage", str(tmp_path), "--data.size", "28")
    done = command("train", "extractor", *arguments)
    assert done.returncode == 0, done.stderr[-1000:]
    uri = extractor_file.find(str(next((tmp_path / "data").iterdir())), 28)
    assert uri is not None
    assert done.stdout.splitlines()[-1].endswith(uri)
    wrong = command("train", "extractor", "--data.sauce", "x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean" in wrong.stderr

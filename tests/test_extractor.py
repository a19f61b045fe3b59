"""The extractor: its features at every size, its training, its file: found, shipped, trained on the cluster, damaged."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from cluster import storage
from models.nets.features import SURE, Extractor, ExtractorConfig
from train.config.data import ImageData
from train.data import images
from train.data.images import Images
from train.data.shipped.files import shipped
from train.data.shipped.make import GARMENTS
from train.gan import extractor
from train.gan.config import GanConfig

SHIPPED = "fashion-mnist-extractor.safetensors"


def config_of(*source: str, **more: object) -> GanConfig:
    return GanConfig.model_validate(
        {"data": {"source": list(source or ("fashion-mnist",)), **more}}
    )


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pictures, prepared with 32 pixels."""
    return Path(images.prepare(ImageData(), str(tmp_path_factory.mktemp("kiln"))))


@pytest.fixture(scope="module")
def shipped_one() -> Extractor:
    return extractor.unpack(shipped(SHIPPED).read_bytes(), SHIPPED)[0]


@pytest.fixture
def few(tmp_path: Path) -> str:
    """A parquet file of 20 garments, 2 a class, one of each held out."""
    file = tmp_path / "few.parquet"
    table = pq.read_table(shipped("fashion-mnist.parquet"))
    held = np.arange(20) < 10
    pq.write_table(
        table.slice(0, 20).set_column(
            3, "split", pa.array(["heldout" if at else "train" for at in held])
        ),
        file,
    )
    return str(file)


@pytest.fixture
def nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("an extractor is trained that is there already")

    monkeypatch.setattr(extractor, "_train_on_cluster", refuse)


# ---------------------------------------------------------------- the net


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("own", [32, 64])
@pytest.mark.parametrize("size", [28, 32, 64, 128])
def test_any_size_gives_features(size: int, own: int, channels: int) -> None:
    torch.manual_seed(0)
    net = Extractor(ExtractorConfig(size=own, channels=channels, num_classes=7)).eval()
    again = Extractor(ExtractorConfig(**json.loads(json.dumps(asdict(net.config))))).eval()
    again.load_state_dict(net.state_dict())
    pictures = torch.rand(3, channels, size, size) * 2 - 1
    features = net.features(pictures)
    assert (features.shape, features.dtype) == ((3, net.config.num_features), torch.float32)
    assert net(pictures).shape == (3, 7)
    assert torch.equal(again.features(pictures), features)
    assert torch.allclose(net.features(pictures[1:2]), features[1:2], atol=1e-6), (
        "a picture does not depend on its company"
    )


def test_a_net_that_cannot_be_is_refused() -> None:
    for wrong in ({"size": 48}, {"channels": 2}, {"num_classes": 0}):
        with pytest.raises(ValueError, match="extractor"):
            ExtractorConfig(**wrong)


def test_modes_are_classes_that_it_is_sure_of_or_else_the_nearest_clusters() -> None:
    net = Extractor(ExtractorConfig(num_classes=3, width=2))
    with torch.no_grad():
        net.head.weight.copy_(torch.eye(3, 4))
        net.head.bias.zero_()
    sure, unsure = (
        torch.log(torch.tensor([SURE, SURE]))
        - torch.log1p(-torch.tensor([SURE, SURE]))
        + torch.tensor([0.8, 0.6])
    )
    features = torch.tensor(
        [[0, float(sure), 0, 9], [0, 0, float(unsure), 9]]
    )  # two others share what is left
    probability = net.head(features).softmax(dim=1).max(dim=1).values
    assert probability[0] > SURE > probability[1]
    assert net.modes(features).tolist() == [1, -1]
    clustered = Extractor(ExtractorConfig(num_classes=4, num_modes=2, width=2))
    clustered.centroids.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]]))
    assert clustered.modes(torch.tensor([[0.9, 0.9, 0.9, 0], [0.2, 0, 0, 0.1]])).tolist() == [1, 0]


# ---------------------------------------------------------------- the shipped one


@pytest.mark.parametrize("size", [28, 32, 64, 128])
def test_the_shipped_one_knows_garments_that_it_has_never_seen(
    size: int, tmp_path: Path, shipped_one: Extractor
) -> None:
    """None of the shipped pictures was trained on, so the training ones count too. Every size is resized to the same picture."""
    found = Images(
        Path(images.prepare(ImageData.model_validate({"size": size}), str(tmp_path))),
        "heldout",
        size,
    )
    assert extractor.measure(shipped_one, found, telling=True) >= 0.9


def test_the_shipped_one_has_seen_neither_side(garments: Path, shipped_one: Extractor) -> None:
    sides = [Images(garments, split, 32) for split in ("train", "heldout")]
    right = []
    for side in sides:
        assert side.labels is not None
        found = shipped_one(torch.from_numpy(side.centered(slice(0, 1000)))).argmax(dim=1).numpy()
        right.append((found == side.labels[:1000]).mean())
    assert abs(right[0] - right[1]) < 0.02, "what it had learned by heart, it would know better"


def test_the_shipped_one_says_what_it_is() -> None:
    content = shipped(SHIPPED).read_bytes()
    net, card = extractor.unpack(content, SHIPPED)
    assert len(content) < 2_000_000
    assert (card.task, card.classes, card.train, card.heldout) == (
        "classes",
        GARMENTS,
        45_000,
        5_000,
    )
    assert card.accuracy >= 0.9
    assert not net.training
    assert net.config.num_modes == 0


@pytest.mark.usefixtures("nothing_trains")
def test_the_shipped_data_take_the_shipped_one(tmp_path: Path) -> None:
    said: list[str] = []
    for size in (28, 32):
        config = config_of(size=size)
        dataset = images.prepare(config.data, str(tmp_path))
        found = extractor.prepare(config, dataset, said.append)
        assert storage.read_bytes(found) == shipped(SHIPPED).read_bytes()
        assert found.startswith(dataset)
        assert extractor.prepare(config, dataset, said.append) == found
    assert len(said) == 4
    assert "10 classes apart, 9" in said[0]
    facts = extractor.facts(found)
    assert facts["uri"] == found
    assert facts["sha256"] == storage.sha256(shipped(SHIPPED))
    assert facts["accuracy"] >= 0.9


# ---------------------------------------------------------------- training


def test_it_learns_and_the_same_each_time(garments: Path) -> None:
    state = torch.get_rng_state()
    content = extractor.pack(*extractor.train(garments, 32, steps=20))
    assert extractor.pack(*extractor.train(garments, 32, steps=20)) == content
    assert torch.equal(torch.get_rng_state(), state), "the caller's own draws are left alone"
    net, card = extractor.unpack(content, "trained")
    assert card.accuracy > 0.5, "chance is a tenth"
    assert card.accuracy == extractor.measure(net, Images(garments, "heldout", 32), telling=True)
    assert (card.task, card.train, card.heldout) == ("classes", 9000, 1000)
    assert card.dataset == storage.read_json(garments / "dataset.json")["fingerprint"]


def test_without_classes_it_learns_how_pictures_are_turned(tmp_path: Path) -> None:
    table = pq.read_table(shipped("fashion-mnist.parquet"), columns=["image", "split"])
    pq.write_table(table, tmp_path / "plain.parquet")
    dataset = Path(
        images.prepare(ImageData(source=[str(tmp_path / "plain.parquet")]), str(tmp_path))
    )
    net, card = extractor.train(dataset, 32, steps=20)
    assert (card.task, card.classes) == ("rotations", [])
    assert card.accuracy > 0.4, "chance is a quarter"
    assert net.config.num_classes == 4
    assert net.config.num_modes == 20
    pictures = Images(dataset, "train", 32)
    modes = net.modes(net.features(torch.from_numpy(pictures.centered(slice(0, 1000)))))
    assert len(modes.unique()) == 20


def test_turned_pictures() -> None:
    picture = torch.arange(4.0).reshape(1, 1, 2, 2).expand(4, 1, 2, 2)
    expected = [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    assert extractor.turned(picture, np.arange(4)).flatten(1).tolist() == expected


def test_clusters_are_the_means_of_what_is_nearest() -> None:
    draw = np.random.default_rng(0)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    points = (
        centres[:, None] + torch.from_numpy(draw.normal(0, 0.5, (3, 50, 2)).astype(np.float32))
    ).reshape(-1, 2)
    found = extractor.clusters(points, 3)
    assert torch.allclose(found[found.sum(dim=1).argsort()][0], points[:50].mean(dim=0), atol=1e-5)
    assert {tuple(row) for row in found.div(10).round().int().tolist()} == {(0, 0), (1, 0), (0, 1)}
    same = extractor.clusters(torch.ones(20, 2), 3)
    assert torch.equal(same, torch.ones(3, 2)), "more clusters than different points"


@pytest.mark.usefixtures("ray_address")
def test_other_data_are_trained_for_once_on_the_cluster(
    few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    config = config_of(few, size=28)
    dataset = images.prepare(config.data, str(tmp_path / "kiln"))
    found = extractor.prepare(config, dataset, said.append)
    _, card = extractor.read(found)
    assert (card.task, card.train, card.heldout) == ("classes", 10, 10)
    assert said[0] == "extractor: training on 10 pictures, once for this data set"
    assert said[1].startswith(f"extractor {Path(found).stem[-12:]}: tells 10 classes apart, ")
    assert len(said) == 2
    monkeypatch.setattr(extractor, "_train_on_cluster", None)
    assert extractor.prepare(config, dataset, said.append) == found
    assert extractor.load(found, "cpu").config.size == 32


@pytest.mark.usefixtures("ray_address")
def test_what_fails_on_the_cluster_is_one_sentence(few: str, tmp_path: Path) -> None:
    config = config_of(few)
    dataset = images.prepare(config.data, str(tmp_path / "kiln"))
    file = Path(dataset) / "train.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match=r"^\S*train\.npy is missing or truncated: delete \S+ and it will be prepared again$",
    ):
        extractor.prepare(config, dataset)


# ---------------------------------------------------------------- the file


@pytest.fixture(params=["folder", "s3"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The shipped pictures' data set as far as `prepare` looks at it, on a disk and on an object store."""
    uri = (
        str(tmp_path)
        if request.param == "folder"
        else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    )
    splits = {split: {"pictures": 1000} for split in ("train", "heldout")}
    storage.write_json(
        storage.join(uri, "dataset.json"), {"source": ["fashion-mnist"], "splits": splits}
    )
    return uri


@pytest.mark.usefixtures("nothing_trains")
def test_a_damaged_file_is_refused_and_deleting_it_helps(dataset: str) -> None:
    found = extractor.prepare(config_of(), dataset)
    content = storage.read_bytes(found)
    flipped = bytearray(content)
    flipped[-100] ^= 1
    for damaged in (bytes(flipped), content[:-1], b""):
        storage.write_bytes(found, damaged)
        for use in (
            lambda: extractor.prepare(config_of(), dataset),
            lambda: extractor.load(found, "cpu"),
        ):
            with pytest.raises(
                ValueError,
                match=r"px-[0-9a-f]{12}\.safetensors is damaged .*: delete it, and the extractor will be trained",
            ):
                use()
    storage.delete(found)
    with pytest.raises(ValueError, match="is missing: start the run again"):
        extractor.load(found, "cpu")
    assert extractor.prepare(config_of(), dataset) == found
    assert storage.read_bytes(found) == content


@pytest.mark.usefixtures("nothing_trains")
def test_a_half_written_file_does_not_exist(dataset: str) -> None:
    storage.write_bytes(
        storage.join(dataset, "extractor-v1-32px-0123456789ab.safetensors.5d41.tmp"), b"half"
    )
    assert extractor.find(dataset, 32) is None
    found = extractor.prepare(config_of(), dataset)
    assert extractor.find(dataset, 32) == found
    assert extractor.find(dataset, 64) is None


def test_another_s_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^here is no extractor of this version .*: delete it"):
        extractor.unpack(save({"weight": torch.zeros(2)}), "here")
    net = Extractor(ExtractorConfig(width=4))
    wider = save(net.state_dict(), {"extractor": json.dumps({"config": {"width": 8}, "card": {}})})
    with pytest.raises(ValueError, match=r"^here is no extractor of this version"):
        extractor.unpack(wider, "here")


@pytest.mark.usefixtures("nothing_trains")
def test_what_cannot_be_judged_is_refused_first(dataset: str, tmp_path: Path) -> None:
    meta = storage.read_json(storage.join(dataset, "dataset.json"))
    meta["splits"]["heldout"]["pictures"] = 9
    storage.write_json(storage.join(tmp_path, "few", "dataset.json"), meta)
    with pytest.raises(
        ValueError,
        match=r"few has 9 pictures in its heldout split, and .* fewer than 10: give more",
    ):
        extractor.prepare(config_of(), storage.join(tmp_path, "few"))


def test_the_command_finds_it_and_says_so(command: Callable, tmp_path: Path) -> None:
    done = command(
        "train",
        "extractor",
        "--config",
        "gan-tiny",
        "--storage",
        str(tmp_path),
        "--data.size",
        "28",
    )
    assert done.returncode == 0, done.stderr[-1000:]
    found = extractor.find(str(next((tmp_path / "data").iterdir())), 28)
    assert found is not None
    assert done.stdout.splitlines()[-1].endswith(found)
    wrong = command("train", "extractor", "--data.sauce", "x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean" in wrong.stderr

"""Images: found in every kind of source, checked, decoded once and read by position."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from cluster import storage
from train.config.data import ImageData
from train.data.dataset import Dataset
from train.data.image_sources import find
from train.data.images import Images, decode, prepare
from train.data.order import Order, positions


def png(
    level: int = 0, size: tuple[int, int] = (32, 32), mode: str = "L", kind: str = "PNG"
) -> bytes:
    """Encode a plain image."""
    file = io.BytesIO()
    Image.new(mode, size, level if mode in ("L", "1") else (level,) * len(mode)).save(file, kind)
    return file.getvalue()


def folder_of(root: Path, files: dict[str, bytes]) -> str:
    """Write files into a folder and return it."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def parquet_of(
    path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None
) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return str(path)


def data_of(*source: str, **more: Any) -> ImageData:
    return ImageData.model_validate({"source": list(source), "horizontal_flip": False, **more})


def both_splits(dataset: Dataset, size: int = 32) -> dict[str, Images]:
    return {split: Images(dataset, split, size) for split in ("train", "heldout")}


def levels(images: Images) -> list[int]:
    """Return the gray level of each plain image."""
    return [int(value) for value in images.pixels[:, 0, 0, 0]]


# ---- sources


def test_column_of_the_shipped_garments_decides_the_split(tmp_path: Path) -> None:
    dataset = prepare(data_of("fashion-mnist"), str(tmp_path), conditional=True)
    splits = both_splits(dataset)
    assert (len(splits["train"]), len(splits["heldout"])) == (9000, 1000)
    for split, each in (("train", 900), ("heldout", 100)):
        labels = splits[split].labels
        assert labels is not None
        assert np.bincount(labels).tolist() == [each] * 10
    assert splits["train"].meta["classes"][9] == "Ankle boot"


def test_shipped_emoji_are_in_color_and_hold_out_every_tenth_of_a_class(
    tmp_path: Path,
) -> None:
    dataset = prepare(data_of("emoji", size=64, channels=3), str(tmp_path), conditional=True)
    splits = both_splits(dataset, 64)
    counts = {}
    for split, images in splits.items():
        assert images.labels is not None
        counts[split] = np.bincount(images.labels).tolist()
    assert counts == {"train": [153, 144, 118, 197, 77, 238], "heldout": [16, 15, 13, 21, 8, 26]}
    assert splits["train"].meta["classes"][0] == "Smileys & Emotion"
    assert splits["train"].pixels.shape[1:] == (64, 64, 3)
    seen = {pixels.tobytes() for pixels in splits["train"].pixels}
    assert not [pixels for pixels in splits["heldout"].pixels if pixels.tobytes() in seen], (
        "a held-out image is in the train split too"
    )


def test_subfolders_are_classes(tmp_path: Path) -> None:
    files = {
        f"pets/{name}/{index}.png": png(40 * index + level)
        for index in range(5)
        for name, level in (("cat", 1), ("dog", 2))
    }
    source = folder_of(tmp_path, files) + "/pets"
    splits = both_splits(prepare(data_of(source, heldout_fraction=0.2), str(tmp_path)))
    assert splits["train"].meta["classes"] == ["cat", "dog"]
    assert (len(splits["train"]), len(splits["heldout"])) == (8, 2)
    for images in splits.values():
        assert images.labels is not None
        assert [level % 40 - 1 for level in levels(images)] == images.labels.tolist()
    assert sorted(levels(splits["train"]) + levels(splits["heldout"])) == sorted(
        40 * index + level for index in range(5) for level in (1, 2)
    )


def test_folders_named_after_splits_decide_the_split(tmp_path: Path) -> None:
    files = {
        f"{split}/{name}/0.png": png(level)
        for level, split in enumerate(("train", "test"))
        for name in ("a", "b")
    }
    splits = both_splits(prepare(data_of(folder_of(tmp_path / "source", files)), str(tmp_path)))
    assert levels(splits["train"]) == [0, 0]
    assert levels(splits["heldout"]) == [1, 1]
    assert splits["train"].meta["classes"] == ["a", "b"]


@pytest.mark.parametrize("folders", [["train"], ["test", "dev"]])
def test_folders_of_one_split_only_leave_the_split_to_heldout_fraction(
    folders: list[str], tmp_path: Path
) -> None:
    source = folder_of(
        tmp_path / "source",
        {
            f"{folder}/{name}/{i}.png": png(i)
            for folder in folders
            for name in "ab"
            for i in range(10)
        },
    )
    splits = both_splits(prepare(data_of(source, heldout_fraction=0.2), str(tmp_path)))
    assert len(splits["heldout"]) == 4 * len(folders)
    assert splits["train"].meta["classes"] == ["a", "b"]


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    source = folder_of(
        tmp_path / "source",
        {"a.png": png(), "b.PNG": png(), "c.jpg": png(kind="JPEG"), ".DS_Store": b"hidden"},
    )
    splits = both_splits(prepare(data_of(source), str(tmp_path)))
    assert splits["train"].meta["classes"] == []
    assert splits["train"].batch(Order(2, 0), np.arange(2))[1] is None


def test_list_of_globs_finds_each_image_once(tmp_path: Path) -> None:
    folder_of(
        tmp_path / "source",
        {
            **{f"{name}/{i}.png": png(i) for name in "ab" for i in range(3)},
            "a/notes.txt": b"not an image",
        },
    )
    assert find(data_of(f"{tmp_path}/source/*/*.png")).classes == ["a", "b"]
    assert find(data_of(f"{tmp_path}/source/a/[01].png", f"{tmp_path}/source/b")).count == 5
    assert find(data_of(f"{tmp_path}/**/*.png")).count == 6
    assert find(data_of(f"{tmp_path}/source/*/*.png", f"{tmp_path}/source/*/0.png")).count == 6, (
        "an image that two patterns match counts once"
    )
    with pytest.raises(ValueError, match=r"there are no images at .*source/\*\.png"):
        find(data_of(f"{tmp_path}/source/*.png"))  # * does not match a slash


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_images_keep_their_numbered_labels(tmp_path: Path, as_struct: bool) -> None:
    images = [
        {"bytes": png(level), "path": None} if as_struct else png(level) for level in range(6)
    ]
    features = {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "label": {"names": ["zero", "one", "two"], "_type": "ClassLabel"},
            }
        }
    }
    source = parquet_of(
        tmp_path / "x.parquet",
        {"image": images, "label": [0, 1, 2] * 2},
        {b"huggingface": json.dumps(features).encode()},
    )
    splits = both_splits(prepare(data_of(source), str(tmp_path), conditional=True))
    assert splits["train"].meta["classes"] == ["zero", "one", "two"]
    assert splits["train"].labels is not None
    assert [level % 3 for level in levels(splits["train"])] == splits["train"].labels.tolist()


@pytest.mark.parametrize(("split", "fraction"), [("train", 0.1), ("train", 0.3), ("test", 0.3)])
def test_split_column_of_one_split_only_leaves_the_split_to_heldout_fraction(
    split: str, fraction: float, tmp_path: Path
) -> None:
    source = parquet_of(
        tmp_path / "x.parquet", {"image": [png(i) for i in range(10)], "split": [split] * 10}
    )
    splits = both_splits(prepare(data_of(source, heldout_fraction=fraction), str(tmp_path)))
    assert len(splits["heldout"]) == 10 * fraction
    assert sorted(levels(splits["train"]) + levels(splits["heldout"])) == list(range(10))


def test_class_names_come_from_the_metadata_of_the_label_column(tmp_path: Path) -> None:
    features = {
        "fine_label": {"names": ["oak", "pike", "carp"]},
        "coarse_label": {"names": ["tree", "fish"]},
    }
    source = parquet_of(
        tmp_path / "x.parquet",
        {"image": [png()] * 3, "fine_label": [0, 1, 2], "coarse_label": [0, 1, 1]},
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    assert find(data_of(source, label_column="fine_label")).classes == ["oak", "pike", "carp"]
    assert find(data_of(source, label_column="coarse_label")).classes == ["tree", "fish"]


@pytest.mark.parametrize(
    "metadata",
    [
        "null",
        '{"info": null}',
        '{"info": {"features": null}}',
        '{"info": {"features": {"label": []}}}',
    ],
)
def test_labels_without_names_are_their_own_class_names(metadata: str, tmp_path: Path) -> None:
    source = parquet_of(
        tmp_path / "x.parquet",
        {"image": [png()] * 2, "label": [3, 5]},
        {b"huggingface": metadata.encode()},
    )
    assert find(data_of(source)).classes == ["3", "5"]


def test_parquet_file_names_decide_the_split_and_label_names_are_classes(tmp_path: Path) -> None:
    for split, level in (("train", 10), ("test", 20)):
        parquet_of(
            tmp_path / "source" / f"{split}-00000-of-00001.parquet",
            {"png": [png(level), png(level + 1)], "kind": ["b", "a"]},
        )
    data = data_of(str(tmp_path / "source"), image_column="png", label_column="kind")
    splits = both_splits(prepare(data, str(tmp_path), conditional=True))
    assert splits["train"].meta["classes"] == ["a", "b"]
    assert levels(splits["train"]) == [10, 11]
    assert levels(splits["heldout"]) == [20, 21]
    assert splits["heldout"].labels is not None
    assert splits["heldout"].labels.tolist() == [1, 0]


def test_torchvision_data_set_keeps_its_split_labels_and_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are in torch's cache already, so nothing is downloaded."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    raw = tmp_path / "datasets" / "FashionMNIST" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 3)):
        pixels, labels = np.full((count, 28, 28), count, np.uint8), np.arange(count, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">i4").tobytes() + pixels.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + np.array([count], ">i4").tobytes() + labels.tobytes()
        )
    splits = both_splits(
        prepare(data_of("torchvision:FashionMNIST", size=28), str(tmp_path), conditional=True), 28
    )
    assert levels(splits["train"]) == [4] * 4
    assert levels(splits["heldout"]) == [3] * 3
    assert splits["train"].labels is not None
    assert splits["train"].labels.tolist() == [0, 1, 2, 3]
    assert splits["train"].meta["classes"][1] == "Trouser"


@pytest.mark.parametrize(
    "name", ["NoSuchSet", "mnist", "utils", "vision", "VisionDataset", "PhotoTour"]
)
def test_torchvision_name_that_is_not_a_data_set_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"torchvision:{name}: torchvision downloads no data set of that name"
    ):
        find(data_of(f"torchvision:{name}"))


def test_missing_package_of_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)  # as if it were not installed
    # Without network: scipy is imported after the download.
    monkeypatch.setattr(torchvision.datasets.SVHN, "download", lambda self: None)
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    with pytest.raises(
        ValueError,
        match=r"torchvision:SVHN needs a package that is not installed .*scipy.*: install it",
    ) as caught:
        find(data_of("torchvision:SVHN"))
    assert "\n" not in str(caught.value)


# ---- invalid sources


INVALID: dict[str, tuple[Callable[[Path], str], str]] = {
    "nothing at the path": (lambda path: str(path / "nowhere"), "no images at .*nowhere"),
    "an empty folder": (lambda path: folder_of(path, {}), "no images at"),
    "one image only": (
        lambda path: folder_of(path, {"a.png": png()}),
        "has 1 image, 1 of them held out.*data.heldout_fraction",
    ),
    "a text file among images": (
        lambda path: folder_of(path, {"a.png": png(), "notes.txt": b"x"}),
        "notes.txt is not one of the files expected here .*.png",
    ),
    "text named .png": (
        lambda path: folder_of(path, {"a.png": png(), "b.png": b"hello"}),
        "b.png is not an image .its bytes have no known image format",
    ),
    "an empty file": (
        lambda path: folder_of(path, {"a.png": png(), "b.png": b""}),
        "b.png is not an image .it is empty",
    ),
    "a truncated image": (
        lambda path: folder_of(
            path, {"a.png": png(), "b.jpg": png(128, (64, 64), kind="JPEG")[:-100]}
        ),
        "b.jpg is a damaged image",
    ),
    "a PNG with a truncated header": (
        lambda path: folder_of(path, {"a.png": png(), "b.png": png()[:11] + b"\x05" + png()[12:]}),
        r"b.png is a damaged image .Truncated IHDR chunk",
    ),
    "a BMP with too long a palette": (
        lambda path: folder_of(
            path,
            {"a.png": png(), "b.bmp": png(kind="BMP")[:46] + b"\x00\x08" + png(kind="BMP")[48:]},
        ),
        "b.bmp is a damaged image .invalid palette size",
    ),
    "color among grayscale": (
        lambda path: folder_of(path, {"a.png": png(), "b.png": png(mode="RGB")}),
        "b.png is in color while data.channels is 1",
    ),
    "16 bits per channel": (
        lambda path: folder_of(path, {"a.png": png(), "b.png": png16()}),
        "b.png has pixels of Pillow's mode I;16",
    ),
    "images beside class folders": (
        lambda path: folder_of(path, {"a/a.png": png(), "b.png": png()}),
        "b.png is beside the class folders a",
    ),
    "parquet files beside images": (
        lambda path: (
            folder_of(path, {"a.png": png()})
            + parquet_of(path / "b.parquet", {"image": [png()]})[:0]
        ),
        "mixes parquet and other files",
    ),
    "a truncated parquet file": (
        lambda path: truncated(parquet_of(path / "x.parquet", {"image": [png()] * 9})),
        "x.parquet is not a readable parquet",
    ),
    "text named .parquet": (
        lambda path: folder_of(path, {"x.parquet": b"hello"}),
        "x.parquet is not a readable parquet",
    ),
    "another column": (
        lambda path: parquet_of(path / "x.parquet", {"png": [png()]}),
        "no column 'image'.*one of .'png'",
    ),
    "a column of text": (
        lambda path: parquet_of(path / "x.parquet", {"image": ["a"]}),
        "holds string in column 'image'",
    ),
    "a parquet file without rows": (
        lambda path: parquet_of(path / "x.parquet", {"image": pa.array([], pa.binary())}),
        "x.parquet has no rows",
    ),
    "a row without an image": (
        lambda path: parquet_of(path / "x.parquet", {"image": [png(), None]}),
        "x.parquet, row 1 is not an image .it is empty",
    ),
    "labels that are not integers": (
        lambda path: parquet_of(path / "x.parquet", {"image": [png()] * 2, "label": [0.5, 1.5]}),
        "x.parquet holds double in column 'label'.*name another in data.label_column",
    ),
    "labels that are lists": (
        lambda path: parquet_of(path / "x.parquet", {"image": [png()] * 2, "label": [[1], [0, 2]]}),
        "x.parquet holds list<.*> in column 'label'.*name another in data.label_column",
    ),
    "splits that are lists": (
        lambda path: parquet_of(
            path / "x.parquet", {"image": [png()] * 2, "split": [["train"], ["test"]]}
        ),
        "x.parquet holds list<.*> in column 'split'",
    ),
}


def png16() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(file, "PNG")
    return file.getvalue()


def truncated(path: str) -> str:
    Path(path).write_bytes(Path(path).read_bytes()[:-20])
    return path


@pytest.mark.parametrize("case", INVALID)
def test_invalid_source_is_refused_and_leaves_no_data_set(case: str, tmp_path: Path) -> None:
    make, message = INVALID[case]
    with pytest.raises(ValueError, match=message) as caught:
        prepare(data_of(make(tmp_path / "source")), str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize("labels", [None, [0, None, 1]])
def test_conditional_model_needs_classes(labels: list[int | None] | None, tmp_path: Path) -> None:
    source = parquet_of(
        tmp_path / "x.parquet", {"image": [png()] * 3} | ({"label": labels} if labels else {})
    )
    prepare(data_of(source), str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"model\.conditional needs classes and data\.source .*x\.parquet gives none",
    ):
        prepare(data_of(source), str(tmp_path), conditional=True)


def test_grayscale_among_color_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", {"a.png": png(mode="RGB"), "b.png": png()})
    with pytest.raises(ValueError, match=r"b\.png is grayscale while data\.channels is 3"):
        prepare(data_of(source, channels=3), str(tmp_path))


# ---- decoding


def test_shorter_side_is_resized_and_the_center_kept() -> None:
    wide = np.zeros((64, 256), np.uint8)
    wide[:, 96:160] = 200
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    image = decode(file.getvalue(), "x.png", 32, 1)
    assert image.shape == (32, 32, 1)
    # Beside an edge the filter reaches across it.
    assert np.abs(image[:, 2:-2].astype(int) - 200).max() <= 2
    assert image.min() > 150


def test_shrinking_is_antialiased() -> None:
    """Stripes finer than the target's pixels become their mean."""
    file = io.BytesIO()
    Image.fromarray(np.tile(np.array([0, 255], np.uint8), (128, 64))).save(file, "PNG")
    assert np.abs(decode(file.getvalue(), "x.png", 32, 1)[:, 2:-2].astype(int) - 128).max() <= 2


def test_transparent_image_is_put_on_white() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), (10, 20, 30, 0)).save(file, "PNG")
    assert (decode(file.getvalue(), "x.png", 32, 3) == 255).all()


# ---- preparing and reading


def test_images_are_prepared_once_per_fingerprint(tmp_path: Path) -> None:
    source = Path(
        folder_of(
            tmp_path / "source", {f"{name}.png": png(level) for level, name in enumerate("abcd")}
        )
    )
    first = prepare(data_of(str(source)), str(tmp_path))
    before = (Path(first.uri) / "train.npy").stat().st_mtime_ns
    assert prepare(data_of(str(source)), str(tmp_path)) == first
    assert (Path(first.uri) / "train.npy").stat().st_mtime_ns == before
    others = {
        prepare(data_of(str(source), **change), str(tmp_path)).uri
        for change in ({"size": 28}, {"random_crop": True}, {"heldout_fraction": 0.5})
    }
    (source / "d.png").write_bytes(png(99))
    others.add(prepare(data_of(str(source)), str(tmp_path)).uri)
    assert len(others | {first.uri}) == 5
    assert not list((tmp_path / "data").glob(".preparing-*"))


def test_dataset_json_matches_the_files(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "s", {f"x/{i}.png": png(i) for i in range(4)})
    dataset = prepare(data_of(source), str(tmp_path))
    folder = Path(dataset.uri)
    meta = storage.read_json(folder / "dataset.json")
    assert meta == dataset.meta
    assert folder.name == f"{meta['name']}-{meta['fingerprint']}"
    for split, count in (("train", 3), ("heldout", 1)):
        assert meta["splits"][split]["images"] == count
        assert {
            name: storage.sha256(folder / name) for name in (f"{split}.npy", f"{split}-labels.npy")
        } == meta["splits"][split]["sha256"]


def test_truncated_file_of_a_data_set_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "s", {f"{i}.png": png(i) for i in range(4)})
    dataset = prepare(data_of(source), str(tmp_path))
    truncated(f"{dataset.uri}/train.npy")
    with pytest.raises(ValueError, match=r"train\.npy is missing or truncated: delete"):
        Images(dataset, "train", 32)
    Path(dataset.uri, "heldout.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"heldout\.npy is missing or truncated: delete"):
        Images(dataset, "heldout", 32)


def test_position_gives_the_same_image_at_any_number_of_workers(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for index in range(20):
        (tmp_path / "source").mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (40, 40), np.uint8)).save(
            tmp_path / "source" / f"{index}.png"
        )
    dataset = prepare(data_of(str(tmp_path / "source"), random_crop=True), str(tmp_path))
    images = Images(dataset, "train", 32, horizontal_flip=True)
    order = Order(len(images), seed=3)
    alone = images.batch(order, positions(4, 8, 8, 0, 1)[0])[0]
    by_rank = [images.batch(order, positions(4, 8, 4, rank, 2)[0])[0] for rank in range(2)]
    assert np.array_equal(alone, np.concatenate(by_rank))
    assert alone.shape == (8, 1, 32, 32)
    assert alone.dtype == np.float32
    assert alone.min() >= -1
    assert alone.max() <= 1
    later = images.batch(order, positions(4, 8, 8, 0, 1)[0] + 18 * 8)[0]
    assert not np.array_equal(alone, later)


def test_augmented_images_are_crops_of_the_stored_image(tmp_path: Path) -> None:
    pixels = np.arange(36 * 36, dtype=np.uint32).reshape(36, 36) % 251
    (tmp_path / "source").mkdir()
    for index in range(2):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "source" / f"{index}.png")
    dataset = prepare(data_of(str(tmp_path / "source"), random_crop=True), str(tmp_path))
    images = Images(dataset, "train", 32, horizontal_flip=True)
    stored = images.pixels[0, :, :, 0]
    crops = {
        mirror(stored[top : top + 32, left : left + 32]).tobytes()
        for top in range(5)
        for left in range(5)
        for mirror in (np.asarray, np.fliplr)
    }
    seen = {
        np.round((crop[0] + 1) * 127.5).astype(np.uint8).tobytes()
        for crop in images.batch(Order(1, 0), np.arange(300))[0]
    }
    assert seen <= crops
    assert len(seen) > 40, "300 draws should give nearly all of the 50 crops"
    assert np.array_equal(
        np.round((images.centered(slice(0, 1))[0, 0] + 1) * 127.5), stored[2:34, 2:34]
    )


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in other directories."""
    folder_of(tmp_path / "source", {f"{name}/{i}.png": png(i) for name in "ab" for i in range(2)})
    monkeypatch.chdir(tmp_path)
    data = data_of("source/*/*.png")
    assert find(data).files == [
        f"{tmp_path}/source/{name}/{i}.png" for name in "ab" for i in range(2)
    ]
    dataset = prepare(data, "kiln")
    assert Path(dataset.uri).parent == tmp_path / "kiln" / "data"
    assert prepare(data_of(f"{tmp_path}/source/*/*.png"), f"{tmp_path}/kiln") == dataset


def test_data_set_on_an_object_store_exists_once_dataset_json_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store cannot rename: there a data set exists once dataset.json does."""
    source = folder_of(
        tmp_path / "source", {f"{name}/{i}.png": png(i) for name in "ab" for i in range(2)}
    )
    local = prepare(data_of(f"file://{source}/*/*.png"), str(tmp_path))
    monkeypatch.setattr(storage, "local_path", lambda uri: None)
    remote = prepare(data_of(f"file://{source}"), f"file://{tmp_path}/store")
    folder = Path(remote.uri.removeprefix("file://"))
    assert {file.name for file in folder.iterdir()} == {
        file.name for file in Path(local.uri).iterdir()
    }
    (folder / "dataset.json").unlink()
    assert prepare(data_of(f"file://{source}"), f"file://{tmp_path}/store") == remote
    assert storage.exists(storage.join(remote.uri, "dataset.json"))

"""A bundle: the folder that training exports and serving loads, without torch or pickle.

`manifest.json` lists every file with its size and hash, and contains a hash of itself. It is
written last: a folder without a valid manifest is not a bundle.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cluster import storage

MANIFEST = "manifest.json"
KINDS = ("gpt", "gan")
# What the model generated when it was exported; optional.
SAMPLES = {"gpt": "sample.txt", "gan": "sample.png"}
REQUIRED = (
    "kind",
    "created",
    "files",
    "inputs",
    "outputs",
    "opset",
    "parity",
    "run",
    "dataset",
    "metrics",
    "libraries",
    "model",
    "sha256",
)
# The metrics that tables show, which have no space for all.
HEADLINE_METRICS = (
    "heldout_loss",
    "heldout_bits_per_byte",
    "heldout_frechet_distance",
    "heldout_recall",
)

Manifest = dict[str, Any]  # the parsed manifest.json


class TensorSpec(TypedDict):
    """An input or output of a graph; a dimension that may vary is a name."""

    name: str
    dtype: str
    shape: list[int | str]


class ParityCase(TypedDict):
    """A case in which the graph's outputs were compared with torch's."""

    name: str
    max_abs_diff: float


class Parity(TypedDict):
    """The manifest's `parity`: how far the graph's outputs are from torch's."""

    max_abs_diff: float
    tolerance: float
    cases: list[ParityCase]


class Quantization(TypedDict):
    """The manifest's `quantization`: what 8-bit weights cost on held-out text."""

    weights: str
    block_size: int
    evaluated_tokens: int
    bits_per_byte: float
    bits_per_byte_fp32: float


class ModelEntries(TypedDict):
    """The manifest's entries about the model."""

    kind: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    opset: int
    parity: Parity
    quantization: NotRequired[Quantization | None]
    model: Mapping[str, object]
    """Its shape, as its kind's sessions read it."""


class OriginEntries(TypedDict):
    """The manifest's entries about where the bundle comes from."""

    created: str
    """ISO 8601, UTC."""
    run: Mapping[str, object]
    commit: str | None
    dataset: Mapping[str, str]
    metrics: Mapping[str, float]
    libraries: Mapping[str, str]


def write(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Make a local folder a bundle: hash its files, then write the manifest.

    Args:
        folder: contains the files already.
        manifest: all entries of `REQUIRED` but `files` and `sha256`. The registry fills in `name`
            and `version`.

    Raises:
        ValueError: the manifest lacks an entry, or the folder contains no file.
    """
    paths = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and path != Path(folder) / MANIFEST
    )
    if not paths:
        raise ValueError(
            f"{os.fspath(folder)} contains no file: write the bundle's files before its manifest"
        )
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": storage.sha256(path),
        }
        for path in paths
    }
    defaults = {"name": None, "version": None, "commit": None, "quantization": None}
    write_manifest(folder, {**defaults, **manifest, "files": files})


def write_manifest(uri: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write the manifest of the bundle whose files are at `uri`, with its own hash.

    Raises:
        ValueError: the manifest lacks an entry.
    """
    with_hash = {**manifest, "sha256": _manifest_hash(manifest)}
    _check(uri, with_hash)
    storage.write_json(storage.join(uri, MANIFEST), with_hash)


def _manifest_hash(manifest: Manifest) -> str:
    """Return the hash of all entries but `sha256`, independent of order and white space."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(uri: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of the bundle at `uri`, without checking the bundle's files.

    Raises:
        ValueError: the manifest is missing or damaged.
    """
    manifest_uri = storage.join(uri, MANIFEST)
    if not storage.exists(manifest_uri):
        raise ValueError(
            f"{os.fspath(uri)} has no {MANIFEST}: it is not a bundle, or it was never finished; "
            "export the run again"
        )
    try:
        manifest: Manifest = storage.read_json(manifest_uri)
    except ValueError as error:
        raise ValueError(f"{manifest_uri} is damaged ({error}): export the run again") from error
    _check(uri, manifest)
    if manifest["sha256"] != _manifest_hash(manifest):
        raise ValueError(
            f"{manifest_uri} does not match its own sha256: it is damaged, or it was edited; "
            "export the run again"
        )
    return manifest


def verify(uri: str | os.PathLike[str]) -> Manifest:
    """Check every file of the bundle at `uri` against its size and hash; return the manifest.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    manifest = read(uri)
    present = storage.files(uri)
    for path, expected in manifest["files"].items():
        file = storage.join(uri, path)
        if path not in present:
            raise _missing(file)
        if present[path] != expected["bytes"]:
            raise ValueError(
                f"{file} has {present[path]} bytes, its manifest lists {expected['bytes']}: it is "
                "damaged; export the run again"
            )
        if storage.sha256(file) != expected["sha256"]:
            raise _wrong_hash(file)
    return manifest


def read_file(uri: str | os.PathLike[str], manifest: Manifest, path: str) -> bytes:
    """Return the content of a file of the bundle at `uri`.

    Raises:
        ValueError: the file is missing, or its hash is not the one in the manifest.
    """
    file = storage.join(uri, path)
    try:
        content = storage.read_bytes(file)
    except FileNotFoundError as error:
        raise _missing(file) from error
    if hashlib.sha256(content).hexdigest() != manifest["files"][path]["sha256"]:
        raise _wrong_hash(file)
    return content


def _missing(file: str) -> ValueError:
    return ValueError(f"{file} is missing from its bundle: export the run again")


def _wrong_hash(file: str) -> ValueError:
    return ValueError(
        f"{file} does not have the sha256 that its manifest lists: it is damaged; export the run "
        "again"
    )


def size(manifest: Manifest) -> int:
    """Return the bytes of all files of the bundle."""
    return sum(entry["bytes"] for entry in manifest["files"].values())


def describe_weights(manifest: Manifest) -> str:
    """Return the format of the bundle's weights and, for 8 bits, the bits per byte they cost."""
    cost = manifest["quantization"]
    if cost is None:
        return "fp32"
    return (
        f"{cost['weights']} in blocks of {cost['block_size']}: {cost['bits_per_byte']:.4f} bits "
        f"per byte on {cost['evaluated_tokens']:,} held-out tokens, "
        f"{cost['bits_per_byte_fp32']:.4f} with fp32"
    )


def created(manifest: Manifest) -> int:
    """Return when a version was exported: Unix, seconds."""
    return int(datetime.fromisoformat(manifest["created"]).timestamp())


def public_run(manifest: Manifest) -> dict[str, Any]:
    """Return the run that a version was exported from, without its `storage`, which is private."""
    return {key: manifest["run"][key] for key in ("name", "step")}


def _check(uri: str | os.PathLike[str], manifest: object) -> None:
    manifest_uri = storage.join(uri, MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(
            f"{manifest_uri} contains no JSON object: it is damaged; export the run again"
        )
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise ValueError(
            f"{manifest_uri} lacks {', '.join(missing)}: it is damaged, or was written by another "
            "version of raykiln; export the run again"
        )
    if manifest["kind"] not in KINDS:
        raise ValueError(
            f"{manifest_uri} has kind {manifest['kind']!r}: the kinds are {' and '.join(KINDS)}"
        )
    if not isinstance(manifest["files"], dict) or not all(
        isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"}
        for entry in manifest["files"].values()
    ):
        raise ValueError(
            f"{manifest_uri} has no list of files with their sizes and hashes: it is damaged; "
            "export the run again"
        )

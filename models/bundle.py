"""A bundle: the folder that training hands to serving (docs/reference/storage.md, "A bundle"). No torch, no pickle.

`manifest.json` names every file with its size and hash, and has a hash of itself. It is written last: a folder without a valid
manifest is no bundle.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cluster import storage

MANIFEST = "manifest.json"
KINDS = ("gpt", "gan")
SAMPLES = {
    "gpt": "sample.txt",
    "gan": "sample.png",
}  # what the model made at its export; a bundle need not have it
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
# Metrics for where there is no room for all.
HEADLINES = ("heldout_loss", "heldout_bits_per_byte", "heldout_frechet_distance", "heldout_recall")

Manifest = dict[str, Any]


def write(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Makes a local folder a bundle: hashes its files and writes the manifest last.

    Args:
        folder: holds the files already.
        manifest: all of `REQUIRED` but `files` and `sha256`; the registry fills in `name` and `version`.

    Raises:
        ValueError: the manifest lacks an entry, or the folder holds no file.
    """
    paths = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and path != Path(folder) / MANIFEST
    )
    if not paths:
        raise ValueError(
            f"{os.fspath(folder)} holds no file: a bundle is written into a folder that holds its files"
        )
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": storage.sha256(path),
        }
        for path in paths
    }
    write_manifest(
        folder,
        {
            "name": None,
            "version": None,
            "commit": None,
            "quantization": None,
            **manifest,
            "files": files,
        },
    )


def write_manifest(uri: str | os.PathLike[str], manifest: Manifest) -> None:
    """Writes the manifest of the bundle whose files are at `uri`, with its own hash.

    Raises:
        ValueError: the manifest lacks an entry.
    """
    sealed = {**manifest, "sha256": _seal(manifest)}
    _check(uri, sealed)
    storage.write_json(storage.join(uri, MANIFEST), sealed)


def _seal(manifest: Manifest) -> str:
    """The hash of all other entries, however the file is laid out."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(uri: str | os.PathLike[str]) -> Manifest:
    """The manifest of the bundle at `uri`; its files are not looked at.

    Raises:
        ValueError: there is no manifest, or it is damaged.
    """
    place = storage.join(uri, MANIFEST)
    if not storage.exists(place):
        raise ValueError(
            f"{os.fspath(uri)} has no {MANIFEST}: it is no bundle, or one that was never finished; export the run again"
        )
    try:
        manifest = storage.read_json(place)
    except ValueError as error:
        raise ValueError(f"{place} is damaged ({error}): export the run again") from error
    _check(uri, manifest)
    if manifest["sha256"] != _seal(manifest):
        raise ValueError(
            f"{place} is not as it was written (its own sha256 differs): it is damaged, or was edited; export the run again"
        )
    return manifest


def verify(uri: str | os.PathLike[str]) -> Manifest:
    """The manifest of the bundle at `uri`, every file of it checked against its size and hash.

    Raises:
        ValueError: names the damaged or missing file.
    """
    manifest = read(uri)
    present = storage.files(uri)
    for path, expected in manifest["files"].items():
        file = storage.join(uri, path)
        if path not in present:
            raise ValueError(f"{file} is missing from its bundle: export the run again")
        if present[path] != expected["bytes"]:
            raise ValueError(
                f"{file} has {present[path]} bytes where its bundle promises {expected['bytes']}: it is damaged; export the run again"
            )
        if _digest(file) != expected["sha256"]:
            raise ValueError(
                f"{file} is not what its bundle promises (its sha256 differs): it is damaged; export the run again"
            )
    return manifest


def read_file(uri: str | os.PathLike[str], manifest: Manifest, path: str) -> bytes:
    """A file of the bundle at `uri`, as its manifest promises it.

    Raises:
        ValueError: it is missing or damaged.
    """
    file = storage.join(uri, path)
    try:
        content = storage.read_bytes(file)
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing from its bundle: export the run again") from error
    if hashlib.sha256(content).hexdigest() != manifest["files"][path]["sha256"]:
        raise ValueError(
            f"{file} is not what its bundle promises (its sha256 differs): it is damaged; export the run again"
        )
    return content


def size(manifest: Manifest) -> int:
    """Bytes of the bundle's files together."""
    return sum(entry["bytes"] for entry in manifest["files"].values())


def describe_weights(manifest: Manifest) -> str:
    """The weights of the bundle's graph, and what 8 bits cost."""
    cost = manifest["quantization"]
    if cost is None:
        return "fp32"
    return (
        f"{cost['weights']} in blocks of {cost['block_size']}: {cost['bits_per_byte']:.4f} bits a byte on {cost['judged_tokens']:,} held-out tokens, "
        f"{cost['bits_per_byte_fp32']:.4f} with fp32"
    )


def _check(uri: str | os.PathLike[str], manifest: Any) -> None:
    place = storage.join(uri, MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{place} holds no JSON object: it is damaged; export the run again")
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise ValueError(
            f"{place} lacks {', '.join(missing)}: it is damaged, or of another version of raykiln; export the run again"
        )
    if manifest["kind"] not in KINDS:
        raise ValueError(f"{place} has kind {manifest['kind']!r}: known are {' and '.join(KINDS)}")
    if not isinstance(manifest["files"], dict) or not all(
        isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"}
        for entry in manifest["files"].values()
    ):
        raise ValueError(
            f"{place} has no list of files with their sizes and hashes: it is damaged; export the run again"
        )


def _digest(uri: str) -> str:
    filesystem, path = storage.locate(uri)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

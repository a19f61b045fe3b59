"""Files on any storage that pyarrow can address: a folder, NFS, s3://, gs://, hdfs://.

Every place of ours (data, runs, searches, registry) is a URI string; this module is the only one that
turns it into a filesystem. Writes of one file are atomic: a reader sees the old bytes or the new ones.
"""

import hashlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from pyarrow import fs


def locate(uri: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """The filesystem behind `uri` and the path on it. A plain path is made absolute.

    Raises:
        ValueError: the URI's scheme is unknown, or it is malformed.
        OSError: its filesystem cannot be opened. What lies there is not to blame: nobody should take it for damaged.
    """
    text = os.fspath(uri)
    if "://" not in text:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        return fs.FileSystem.from_uri(text)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            without_secrets(
                f"storage {text!r} cannot be opened: {error}. Use a folder, or a URI such as s3://bucket/path"
            )
        ) from error


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """`uri` with `parts` below it."""
    return "/".join([os.fspath(uri).rstrip("/"), *parts])


def local_path(uri: str | os.PathLike[str]) -> Path | None:
    """The path of `uri` on this machine's own (or mounted) filesystem, None where it is remote."""
    filesystem, path = locate(uri)
    return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None


def absolute(uri: str | os.PathLike[str]) -> str:
    """The same place for a process in another folder."""
    local = local_path(uri)
    return os.fspath(uri) if local is None else str(local)


def without_secrets(text: str) -> str:
    """A URI, or a sentence that has some, without the users and passwords that they may hold (s3://KEY:SECRET@bucket)."""
    return re.sub(r"://[^/\s]*@", "://", text)


def exists(uri: str | os.PathLike[str]) -> bool:
    filesystem, path = locate(uri)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def is_file(uri: str | os.PathLike[str]) -> bool:
    filesystem, path = locate(uri)
    return filesystem.get_file_info(path).type == fs.FileType.File


def is_empty(uri: str | os.PathLike[str]) -> bool:
    """Whether the file at `uri` has no bytes."""
    filesystem, path = locate(uri)
    return bool(filesystem.get_file_info(path).size == 0)


def names(uri: str | os.PathLike[str]) -> list[str]:
    """The sorted names of what lies directly below `uri`; empty where there is no such folder."""
    return sorted(info.base_name for info in _below(uri, recursive=False)[1])


def files(uri: str | os.PathLike[str]) -> dict[str, int]:
    """Every file below `uri` as {path relative to uri: bytes}."""
    path, found = _below(uri, recursive=True)
    return {
        os.path.relpath(info.path, path): info.size
        for info in found
        if info.type == fs.FileType.File
    }


def _below(uri: str | os.PathLike[str], recursive: bool) -> tuple[str, list[fs.FileInfo]]:
    filesystem, path = locate(uri)
    if filesystem.get_file_info(path).type != fs.FileType.Directory:
        return path, []
    return path, filesystem.get_file_info(
        fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    )


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    filesystem, path = locate(uri)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str | os.PathLike[str], data: bytes) -> None:
    """Writes one file atomically, folders above it included (object stores are atomic by themselves)."""
    filesystem, path = locate(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as problem:  # Ctrl-C too: nobody else would know what the file beside is
        Path(beside).unlink(missing_ok=True)
        if isinstance(problem, OSError):
            problem.filename = (
                path  # a full disk names no file, and nobody asked for the one beside
            )
        raise


def read_json(uri: str | os.PathLike[str]) -> Any:
    """The JSON at `uri`.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{os.fspath(uri)} is not valid JSON ({error}): it is damaged or half-written"
        ) from error


def write_json(uri: str | os.PathLike[str], value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def upload(local_folder: str | os.PathLike[str], uri: str | os.PathLike[str]) -> None:
    """Copies a local folder's files to `uri` (created where it does not exist)."""
    filesystem, path = locate(uri)
    filesystem.create_dir(path, recursive=True)
    fs.copy_files(os.fspath(local_folder), path, destination_filesystem=filesystem)


def upload_changed(
    local_folder: str | os.PathLike[str],
    uri: str | os.PathLike[str],
    before: dict[str, tuple[int, int]],
) -> None:
    """Copies those of a local folder's files to `uri` that are new or have changed.

    Args:
        before: what an earlier call has copied, as {path relative to the folder: (bytes, ns since the epoch)}; brought up to date.
    """
    filesystem, path = locate(uri)
    there = {os.path.dirname(join(path, name)) for name in before}
    for file in sorted(found for found in Path(local_folder).rglob("*") if found.is_file()):
        name, facts = file.relative_to(local_folder).as_posix(), file.stat()
        now = (facts.st_size, facts.st_mtime_ns)
        if before.get(name) == now:
            continue
        target = join(path, name)
        if (
            folder := os.path.dirname(target)
        ) not in there:  # an object store need not be asked for it at every file
            filesystem.create_dir(folder, recursive=True)
            there.add(folder)
        fs.copy_files(str(file), target, destination_filesystem=filesystem)
        before[name] = now


def download(uri: str | os.PathLike[str], local_folder: str | os.PathLike[str]) -> None:
    """Copies the files below `uri` into a local folder."""
    filesystem, path = locate(uri)
    os.makedirs(local_folder, exist_ok=True)
    fs.copy_files(path, os.path.abspath(local_folder), source_filesystem=filesystem)


def delete(uri: str | os.PathLike[str]) -> None:
    """Removes the file or the folder at `uri`; nothing happens where there is none."""
    filesystem, path = locate(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(path)


def sha256(path: str | os.PathLike[str]) -> str:
    """The hex digest of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files on any storage that pyarrow can address: a folder, NFS, s3://, gs://, hdfs://.

Every location (data, runs, searches, registry) is a URI string or a path, and only this module
turns it into a filesystem. Writing one file is atomic: a reader sees the old bytes or the new ones.
"""

import hashlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from pyarrow import NativeFile, fs


def locate(uri: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of `uri` and the path on it. A plain path is made absolute.

    Raises:
        ValueError: the URI is malformed, or its scheme is unknown.
        OSError: the filesystem cannot be opened, which says nothing about the files on it.
    """
    text = os.fspath(uri)
    if "://" not in text:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            without_secrets(
                f"storage {text!r} cannot be opened: {error}. Use a folder, or a URI such as "
                "s3://bucket/path"
            )
        ) from error
    return filesystem, path


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """Return `uri` with `parts` appended to its path."""
    return "/".join([os.fspath(uri).rstrip("/"), *parts])


def local_path(uri: str | os.PathLike[str]) -> Path | None:
    """Return the path of `uri` on a local (or mounted) filesystem, None for a remote one."""
    filesystem, path = locate(uri)
    return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None


def absolute(uri: str | os.PathLike[str]) -> str:
    """Return `uri` in a form that does not depend on the working directory."""
    local = local_path(uri)
    return os.fspath(uri) if local is None else str(local)


def without_secrets(text: str) -> str:
    """Remove users and passwords (s3://KEY:SECRET@bucket) from the URIs in a text."""
    return re.sub(r"://[^/\s]*@", "://", text)


def exists(uri: str | os.PathLike[str]) -> bool:
    filesystem, path = locate(uri)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def is_file(uri: str | os.PathLike[str]) -> bool:
    filesystem, path = locate(uri)
    return bool(filesystem.get_file_info(path).type == fs.FileType.File)


def is_empty(uri: str | os.PathLike[str]) -> bool:
    """Return whether the file at `uri` has 0 bytes."""
    filesystem, path = locate(uri)
    return bool(filesystem.get_file_info(path).size == 0)


def names(uri: str | os.PathLike[str]) -> list[str]:
    """Return the sorted names of the entries of a folder; empty if it does not exist."""
    return sorted(info.base_name for info in _entries(uri, recursive=False)[1])


def files(uri: str | os.PathLike[str]) -> dict[str, int]:
    """Return {path relative to `uri`: bytes} of every file in a folder and its subfolders."""
    path, found = _entries(uri, recursive=True)
    return {
        os.path.relpath(info.path, path): info.size
        for info in found
        if info.type == fs.FileType.File
    }


def _entries(uri: str | os.PathLike[str], recursive: bool) -> tuple[str, list[fs.FileInfo]]:
    filesystem, path = locate(uri)
    if filesystem.get_file_info(path).type != fs.FileType.Directory:
        return path, []
    return path, filesystem.get_file_info(
        fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    )


def _open(uri: str | os.PathLike[str]) -> NativeFile:
    filesystem, path = locate(uri)
    # By default pyarrow unpacks a file whose name ends with .gz, and packs what it writes there.
    return filesystem.open_input_stream(path, compression=None)


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    with _open(uri) as stream:
        return bytes(stream.read())


def write_bytes(uri: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically, creating the folders above it."""
    filesystem, path = locate(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):  # object stores write atomically
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too: nothing else would remove the temporary file
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            # A full disk names no file, and the user does not know the temporary one.
            error.filename = path
        raise


def read_json(uri: str | os.PathLike[str]) -> Any:
    """Return the JSON at `uri`.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{os.fspath(uri)} is not valid JSON ({error}): it is damaged or was not written "
            "completely"
        ) from error


def write_json(uri: str | os.PathLike[str], value: object) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def upload(local_folder: str | os.PathLike[str], uri: str | os.PathLike[str]) -> None:
    """Copy the files of a local folder to `uri`, which is created if it does not exist."""
    filesystem, path = locate(uri)
    filesystem.create_dir(path, recursive=True)
    fs.copy_files(os.fspath(local_folder), path, destination_filesystem=filesystem)


def upload_file(local_file: str | os.PathLike[str], uri: str | os.PathLike[str]) -> None:
    """Copy a local file to `uri`, in parts. On an object store no folder has to exist."""
    filesystem, path = locate(uri)
    fs.copy_files(os.path.abspath(local_file), path, destination_filesystem=filesystem)


def upload_changed(
    local_folder: str | os.PathLike[str],
    uri: str | os.PathLike[str],
    before: dict[str, tuple[int, int]],
) -> None:
    """Copy the files of a local folder that are new or have changed to `uri`.

    Args:
        before: what earlier calls have copied, as {path relative to the folder: (bytes, time of
            modification in ns)}. It is updated in place.
    """
    filesystem, path = locate(uri)
    # Folders are created once: on an object store each request costs time.
    folders = {os.path.dirname(join(path, name)) for name in before}
    for file in sorted(found for found in Path(local_folder).rglob("*") if found.is_file()):
        name, stat = file.relative_to(local_folder).as_posix(), file.stat()
        now = (stat.st_size, stat.st_mtime_ns)
        if before.get(name) == now:
            continue
        target = join(path, name)
        folder = os.path.dirname(target)
        if folder not in folders:
            filesystem.create_dir(folder, recursive=True)
            folders.add(folder)
        fs.copy_files(str(file), target, destination_filesystem=filesystem)
        before[name] = now


def download(uri: str | os.PathLike[str], local_folder: str | os.PathLike[str]) -> None:
    """Copy the files at `uri` into a local folder."""
    filesystem, path = locate(uri)
    os.makedirs(local_folder, exist_ok=True)
    fs.copy_files(path, os.path.abspath(local_folder), source_filesystem=filesystem)


def delete(uri: str | os.PathLike[str]) -> None:
    """Delete the file or folder at `uri` if it exists."""
    filesystem, path = locate(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(path)


def sha256(uri: str | os.PathLike[str]) -> str:
    """Return the hex SHA-256 digest of a file, which is read in parts."""
    digest = hashlib.sha256()
    with _open(uri) as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()

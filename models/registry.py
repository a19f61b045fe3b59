"""Versions and aliases of models on shared storage.

`<root>/<name>/<version>/` is a bundle; `<root>/<name>/aliases/<alias>.json` names a version.

    version = publish("kiln/models", "gpt", "bundle-folder")
    name, version, uri = resolve("kiln/models", "gpt@production")

A version is complete or does not exist, and it never changes; an alias is moved atomically.
References are "gpt" (the alias production, else the newest version), "gpt/3" and "gpt@production".
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from cluster import cli, storage
from models import bundle

PRODUCTION = "production"  # the alias that a name alone stands for, if it is set
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
REFERENCE = re.compile(
    rf"(?P<name>{NAME.pattern})(/(?P<version>[1-9][0-9]*)|@(?P<alias>{NAME.pattern}))?"
)
ABANDONED_S = 24 * 3600.0  # a copy that is older was abandoned: no bundle takes as long to copy

Uri = str | os.PathLike[str]

logger = logging.getLogger(__name__)


def check_name(what: str, name: str) -> None:
    """Check the name of a model or an alias.

    Args:
        what: "model name" or "alias", for the message.
        name: the name.

    Raises:
        ValueError: the name is invalid.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} is not usable: begin with a letter or digit, then use letters, "
            "digits, '.', '_' and '-'"
        )


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Listed:
    """A model of the registry, each of its files read once."""

    name: str
    versions: dict[int, bundle.Manifest]  # the complete ones, oldest first
    incomplete: list[int]  # never finished, not finished yet, or with a damaged manifest
    aliases: dict[str, int | None]  # and their versions; None: the alias is damaged

    def aliases_of(self, version: int) -> list[str]:
        return [alias for alias, target in self.aliases.items() if target == version]


def listed(root: Uri, name: str) -> Listed:
    """Return a model with its versions and aliases."""
    complete, incomplete = dict[int, bundle.Manifest](), []
    for version in _used_numbers(root, name):
        manifest = _manifest(_version_uri(root, name, version))
        if manifest is None:
            incomplete.append(version)
        else:
            complete[version] = manifest
    return Listed(name, complete, incomplete, aliases(root, name))


def listing(root: Uri) -> list[Listed]:
    """Return all models, also those without a complete version."""
    return [listed(root, name) for name in _model_folders(root)]


def names(root: Uri) -> list[str]:
    """Return the names of the models that have a complete version."""
    return [name for name in _model_folders(root) if versions(root, name)]


def _model_folders(root: Uri) -> list[str]:
    return [name for name in storage.names(root) if NAME.fullmatch(name)]


def versions(root: Uri, name: str) -> list[int]:
    """Return the complete versions of a model, oldest first."""
    return [
        version
        for version in _used_numbers(root, name)
        if _manifest(_version_uri(root, name, version)) is not None
    ]


def aliases(root: Uri, name: str) -> dict[str, int | None]:
    """Return the model's aliases and their versions; None: the alias is damaged."""
    found: dict[str, int | None] = {}
    for alias in _alias_names(root, name):
        try:
            found[alias] = _read_alias(_alias_uri(root, name, alias))
        except ValueError:
            found[alias] = None
    return found


def _alias_names(root: Uri, name: str) -> list[str]:
    files = storage.names(storage.join(root, name, "aliases"))
    return [file.removesuffix(".json") for file in files if file.endswith(".json")]


def _alias_uri(root: Uri, name: str, alias: str) -> str:
    return storage.join(root, name, "aliases", f"{alias}.json")


def _read_alias(uri: str) -> int:
    content = storage.read_json(uri)
    # `type` and not isinstance: true is an int for Python.
    if not isinstance(content, dict) or type(content.get("version")) is not int:
        raise ValueError(
            f'{uri} is damaged: expected something like {{"version": 2}}; set the alias again'
        )
    return int(content["version"])


def resolve(root: Uri, reference: str) -> tuple[str, int, str]:
    """Return the name, the version and the bundle's URI that a reference stands for.

    Raises:
        ValueError: there is no such model, version or alias, the alias is damaged, or the version
            is incomplete.
    """
    match = REFERENCE.fullmatch(reference)
    if not match:
        raise ValueError(
            f"model reference {reference!r} is not understood: write NAME, NAME/VERSION or "
            "NAME@ALIAS, such as gpt, gpt/3 or gpt@production"
        )
    name, known = match["name"], versions(root, match["name"])
    if not known:
        hint = _hint(
            name,
            names(root),
            "the registry is empty; export a run with `python -m train export RUN`",
        )
        raise ValueError(f"model {name!r} is not in {os.fspath(root)}{hint}")
    version = known[-1]
    if match["version"]:
        version = int(match["version"])
    elif match["alias"] or PRODUCTION in _alias_names(root, name):
        version = _aliased(root, name, match["alias"] or PRODUCTION)
    else:
        _warn_of_damaged(root, name, version)
    _check_version(root, name, version, known)
    return name, version, _version_uri(root, name, version)


def _warn_of_damaged(root: Uri, name: str, newest: int) -> None:
    """Log versions after the newest complete one whose manifest is damaged.

    A version without a manifest may be about to be published, so it is not logged.
    """
    for version in _used_numbers(root, name):
        manifest = storage.join(_version_uri(root, name, version), bundle.MANIFEST)
        if version > newest and storage.exists(manifest):
            logger.warning(
                "%s/%s is damaged: using %s/%s, the newest complete version",
                name,
                version,
                name,
                newest,
            )


def _aliased(root: Uri, name: str, alias: str) -> int:
    known = _alias_names(root, name)
    if alias not in known:
        command = f"python -m models alias {name} {alias} VERSION"
        hint = _hint(alias, known, f"it has none; set one with `{command}`")
        raise ValueError(f"model {name!r} has no alias {alias!r}{hint}")
    return _read_alias(_alias_uri(root, name, alias))


def _check_version(root: Uri, name: str, version: int, known: list[int]) -> None:
    if version in known:
        return
    if version in _used_numbers(root, name):
        bundle.read(_version_uri(root, name, version))  # raises what is wrong with it
    raise ValueError(
        f"model {name!r} has no version {version}: it has {', '.join(map(str, known)) or 'none'}"
    )


def _hint(word: str, known: list[str], if_empty: str) -> str:
    """Return the end of a message about an unknown word: the nearest one, or all that there are."""
    if not known:
        return f": {if_empty}"
    verb = "is" if len(known) == 1 else "are"
    return cli.nearest(word, known) or f": there {verb} {', '.join(known)}"


def _version_uri(root: Uri, name: str, version: int) -> str:
    return storage.join(root, name, str(version))


def _used_numbers(root: Uri, name: str) -> list[int]:
    """Return the numbers of all versions, complete or not."""
    return sorted(
        int(entry)
        for entry in storage.names(storage.join(root, name))
        if re.fullmatch(r"[1-9][0-9]*", entry)
    )


def _manifest(uri: str) -> bundle.Manifest | None:
    """Return the manifest of a bundle, None where it is missing or damaged."""
    try:
        return bundle.read(uri)
    except ValueError:
        return None


# ---------------------------------------------------------------- writing


def publish(root: Uri, name: str, local_folder: Uri) -> int:
    """Copy a bundle to the registry as the model's next version, and return its number.

    Any number of processes may publish at the same time; each gets a number of its own.

    Raises:
        ValueError: the name is invalid, or the folder is not a valid bundle.
    """
    check_name("model name", name)
    manifest = bundle.verify(local_folder)
    local_root = storage.local_path(root)
    if local_root is not None:
        return _publish_by_rename(local_root, name, Path(local_folder), manifest)
    return _publish_manifest_last(root, name, Path(local_folder), manifest)


def _publish_by_rename(root: Path, name: str, folder: Path, manifest: bundle.Manifest) -> int:
    """Assemble the version in a hidden folder, then rename that to the next free number."""
    _delete_abandoned(root / name)
    staged = root / name / f".{uuid.uuid4().hex}.tmp"
    try:
        shutil.copytree(folder, staged)
        # copytree copies the folder's time and mode: an old time would make it look abandoned, and
        # the mode of a temporary folder would keep the user that serves it out.
        os.utime(staged)
        shutil.copymode(staged.parent, staged)
        while True:
            version = _next(root, name)
            bundle.write_manifest(staged, manifest | {"name": name, "version": version})
            bundle.verify(staged)
            try:
                os.rename(staged, root / name / str(version))
                return version
            except OSError as error:
                # Another publisher has taken this number: try the next one.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _delete_abandoned(folder: Path) -> None:
    """Delete the unfinished copies of publishers that were killed."""
    for staged in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # its publisher has just renamed it
            if time.time() - staged.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(staged, ignore_errors=True)


def _publish_manifest_last(root: Uri, name: str, folder: Path, manifest: bundle.Manifest) -> int:
    """Copy the files, then write the manifest: object stores cannot rename a folder."""
    version = _claim(root, name)
    uri = _version_uri(root, name, version)
    for path in manifest["files"]:
        storage.upload_file(folder / path, storage.join(uri, path))
    bundle.write_manifest(uri, manifest | {"name": name, "version": version})
    return version


def _claim(root: Uri, name: str) -> int:
    """Claim the next free version by writing a file into it.

    If two publishers claim the same number, at least the later one sees both files, and withdraws
    its claim.
    """
    while True:
        version = _next(root, name)
        uri, claim = _version_uri(root, name, version), f"claim-{uuid.uuid4().hex}"
        storage.write_bytes(storage.join(uri, claim), b"")
        if storage.names(uri) == [claim]:
            return version
        storage.delete(storage.join(uri, claim))


def _next(root: Uri, name: str) -> int:
    return max(_used_numbers(root, name), default=0) + 1


def alias(root: Uri, name: str, alias: str, version: int) -> None:
    """Point an alias of the model to a version, atomically.

    Every alias is a file of its own: two that are set at the same time do not overwrite each other,
    even on object stores, which have no locks.

    Raises:
        ValueError: the name is invalid, there is no such model or version, or the version is
            damaged.
    """
    check_name("alias", alias)
    *_, uri = resolve(root, f"{name}/{version}")
    bundle.verify(uri)
    storage.write_json(_alias_uri(root, name, alias), {"version": version})

"""Versions of models on shared storage: `<root>/<name>/<version>/` is a bundle, `<root>/<name>/aliases/<alias>.json` names one.

    version = publish("kiln/models", "gpt", "bundle-folder")
    name, version, uri = resolve("kiln/models", "gpt@production")

A version is complete or not there, and never changes; an alias moves atomically. References are "gpt" (the alias
production, else the newest version), "gpt/3" and "gpt@production".
"""

import contextlib
import difflib
import errno
import logging
import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from cluster import storage
from models import bundle

PRODUCTION = "production"  # what a name alone stands for, once it is set
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
REFERENCE = re.compile(
    rf"(?P<name>{NAME.pattern})(/(?P<version>[1-9][0-9]*)|@(?P<alias>{NAME.pattern}))?"
)
ABANDONED_S = 24 * 3600.0  # no bundle takes as long to copy

Uri = str | os.PathLike[str]

logger = logging.getLogger(__name__)


def check_name(what: str, name: str) -> None:
    """Raises ValueError where `name` can't be a model's or an alias'; `what` says which of them it is."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} is not usable: begin with a letter or digit, then letters, digits, '.', '_' and '-'"
        )


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Listed:
    """A model as it lies in the registry, each file read once."""

    name: str
    versions: dict[int, bundle.Manifest]  # the complete ones, oldest first
    unfinished: list[
        int
    ]  # what looks like a version and is none: never finished (perhaps not yet), or with a damaged manifest
    aliases: dict[str, int | None]  # and their versions; None where an alias is damaged

    def aliases_of(self, version: int) -> list[str]:
        return [alias for alias, target in self.aliases.items() if target == version]


def listed(root: Uri, name: str) -> Listed:
    manifests = {version: _manifest(_place(root, name, version)) for version in _taken(root, name)}
    complete = {
        version: manifest for version, manifest in manifests.items() if manifest is not None
    }
    return Listed(
        name,
        complete,
        [version for version in manifests if version not in complete],
        aliases(root, name),
    )


def listing(root: Uri) -> list[Listed]:
    """All models, those included of which no version was ever finished."""
    return [listed(root, name) for name in _named(root)]


def names(root: Uri) -> list[str]:
    """The models that have a version."""
    return [name for name in _named(root) if versions(root, name)]


def _named(root: Uri) -> list[str]:
    return [name for name in storage.names(root) if NAME.fullmatch(name)]


def versions(root: Uri, name: str) -> list[int]:
    """The complete versions of a model, oldest first; one without a valid manifest was never finished and is not listed."""
    return [
        version
        for version in _taken(root, name)
        if _manifest(_place(root, name, version)) is not None
    ]


def aliases(root: Uri, name: str) -> dict[str, int | None]:
    """The model's aliases and their versions; None where an alias is damaged."""
    found: dict[str, int | None] = {}
    for alias in _alias_names(root, name):
        try:
            found[alias] = _target(_alias_place(root, name, alias))
        except ValueError:
            found[alias] = None
    return found


def _alias_names(root: Uri, name: str) -> list[str]:
    files = storage.names(storage.join(root, name, "aliases"))
    return [file.removesuffix(".json") for file in files if file.endswith(".json")]


def _alias_place(root: Uri, name: str, alias: str) -> str:
    return storage.join(root, name, "aliases", f"{alias}.json")


def _target(place: str) -> int:
    found = storage.read_json(place)
    if not isinstance(found, dict) or type(found.get("version")) is not int:
        raise ValueError(
            f'{place} is damaged: expected something like {{"version": 2}}; set the alias again'
        )
    return int(found["version"])


def resolve(root: Uri, reference: str) -> tuple[str, int, str]:
    """What a reference stands for: name, version and the bundle's URI.

    Raises:
        ValueError: no such model, version or alias, the alias is damaged, or the version is incomplete.
    """
    match = REFERENCE.fullmatch(reference)
    if not match:
        raise ValueError(
            f"model reference {reference!r} is not understood: write NAME, NAME/VERSION or NAME@ALIAS, such as gpt, gpt/3 or gpt@production"
        )
    name, known = match["name"], versions(root, match["name"])
    if not known:
        raise ValueError(
            f"model {name!r} is not in {os.fspath(root)}{_nearest(name, names(root), 'it is empty; export a run with `python -m train export RUN`')}"
        )
    version = known[-1]
    if match["version"]:
        version = int(match["version"])
    elif match["alias"] or PRODUCTION in _alias_names(root, name):
        version = _aliased(root, name, match["alias"] or PRODUCTION)
    else:
        _warn_of_newer(root, name, version)
    _check_version(root, name, version, known)
    return name, version, _place(root, name, version)


def _warn_of_newer(root: Uri, name: str, newest: int) -> None:
    """A newer version whose manifest is damaged is passed over, but not in silence; one without a manifest may be under way."""
    for version in _taken(root, name):
        if version > newest and storage.exists(
            storage.join(_place(root, name, version), bundle.MANIFEST)
        ):
            logger.warning(
                "%s/%s is damaged: %s/%s is the newest that is not", name, version, name, newest
            )


def _aliased(root: Uri, name: str, alias: str) -> int:
    known = _alias_names(root, name)
    if alias not in known:
        none = f"it has none; set one with `python -m models alias {name} {alias} VERSION`"
        raise ValueError(f"model {name!r} has no alias {alias!r}{_nearest(alias, known, none)}")
    return _target(_alias_place(root, name, alias))


def _check_version(root: Uri, name: str, version: int, known: list[int]) -> None:
    if version in known:
        return
    if version in _taken(root, name):
        bundle.read(_place(root, name, version))  # says what is wrong with it
    raise ValueError(
        f"model {name!r} has no version {version}: it has {', '.join(map(str, known)) or 'none'}"
    )


def _nearest(word: str, known: list[str], none: str) -> str:
    """The end of a sentence about an unknown word."""
    if not known:
        return f": {none}"
    close = difflib.get_close_matches(word, known, n=1)
    return (
        f": did you mean {close[0]!r}?"
        if close
        else f": there {'is' if len(known) == 1 else 'are'} {', '.join(known)}"
    )


def _place(root: Uri, name: str, version: int) -> str:
    return storage.join(root, name, str(version))


def _taken(root: Uri, name: str) -> list[int]:
    """Version numbers in use, complete or not."""
    return sorted(
        int(entry)
        for entry in storage.names(storage.join(root, name))
        if re.fullmatch(r"[1-9][0-9]*", entry)
    )


def _manifest(uri: str) -> bundle.Manifest | None:
    """None where it was never written, or is damaged."""
    try:
        return bundle.read(uri)
    except ValueError:
        return None


# ---------------------------------------------------------------- writing


def publish(root: Uri, name: str, local_folder: Uri) -> int:
    """Makes a bundle the model's next version and returns its number; the folder itself stays as it is.

    Any number of processes may publish at once, each gets a number of its own.

    Raises:
        ValueError: a name that is none, or the folder is no bundle or a damaged one; nothing is published.
    """
    check_name("model name", name)
    manifest = bundle.verify(local_folder)
    local_root = storage.local_path(root)
    if local_root is not None:
        return _publish_by_rename(local_root, name, Path(local_folder), manifest)
    return _publish_manifest_last(root, name, Path(local_folder), manifest)


def _publish_by_rename(root: Path, name: str, folder: Path, manifest: bundle.Manifest) -> int:
    """Assembles the version hidden beside its place, then renames it onto the next free number."""
    _clear_abandoned(root / name)
    staged = root / name / f".{uuid.uuid4().hex}.tmp"
    try:
        shutil.copytree(folder, staged)
        os.utime(
            staged
        )  # an old folder's own time, which copytree gives it, would make it look abandoned
        shutil.copymode(
            staged.parent, staged
        )  # a scratch folder's own is closed to the user who will serve it
        while True:
            version = _next(root, name)
            bundle.write_manifest(staged, manifest | {"name": name, "version": version})
            bundle.verify(staged)
            try:
                os.rename(staged, root / name / str(version))
                return version
            except OSError as error:
                if error.errno not in (
                    errno.ENOTEMPTY,
                    errno.EEXIST,
                ):  # else another publisher took the number: the next one
                    raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _clear_abandoned(folder: Path) -> None:
    """Removes what publishers that were killed had copied so far."""
    for staged in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # its publisher has just renamed it
            if time.time() - staged.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(staged, ignore_errors=True)


def _publish_manifest_last(root: Uri, name: str, folder: Path, manifest: bundle.Manifest) -> int:
    """For object stores, which cannot rename: the files first, the manifest last."""
    version = _claim(root, name)
    for path in manifest["files"]:
        filesystem, target = storage.locate(storage.join(_place(root, name, version), path))
        with open(folder / path, "rb") as source, filesystem.open_output_stream(target) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    bundle.write_manifest(
        _place(root, name, version), manifest | {"name": name, "version": version}
    )
    return version


def _claim(root: Uri, name: str) -> int:
    """The next free version, claimed by a file in it. Of two publishers at least the later sees both claims, and gives way."""
    while True:
        version = _next(root, name)
        place, claim = _place(root, name, version), f"claim-{uuid.uuid4().hex}"
        storage.write_bytes(storage.join(place, claim), b"")
        if storage.names(place) == [claim]:
            return version
        storage.delete(storage.join(place, claim))


def _next(root: Uri, name: str) -> int:
    return max(_taken(root, name), default=0) + 1


def alias(root: Uri, name: str, alias: str, version: int) -> None:
    """Points an alias of the model to a version: readers see the old one or the new one.

    An alias is a file of its own, so that of two that are set at once both stay, on object stores too, which know no lock.

    Raises:
        ValueError: a name that is none, no such model or version, or the version is damaged.
    """
    check_name("alias", alias)
    *_, uri = resolve(root, f"{name}/{version}")
    bundle.verify(uri)
    storage.write_json(_alias_place(root, name, alias), {"version": version})

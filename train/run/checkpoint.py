"""Checkpoints: complete or absent, written in the background, readable at any number of workers.

A checkpoint is a folder `checkpoints/step_000200/`. A part that is not sharded is one file,
`model.safetensors`; a sharded part is one file per worker,
`model_optimizer-00001-of-00004.safetensors`, whose header holds the position of each tensor in the
flattened whole. `manifest.json` is written last and names every file with its size and sha256. A
folder without a valid manifest is skipped with a warning.
"""

import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluster import storage
from train.config.sections import Values
from train.parallel.state import Halt, Shard, State
from train.run.hooks import Hooks

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 3  # raise it when a checkpoint's layout changes
RETRY_S = 1.0
UPLOAD_LIMIT = timedelta(hours=12)  # how long the workers wait for the slowest one's files

T = TypeVar("T")


class FileEntry(TypedDict):
    """What a manifest says about a file."""

    bytes: int
    sha256: str
    part: str


@dataclass(frozen=True)
class Manifest:
    """The content of a complete checkpoint's manifest.json."""

    format: int
    step: int
    world_size: int
    strategy: str
    score: float | None
    """On held-out data at this step, smaller is better; None: not evaluated."""
    files: dict[str, FileEntry]
    """By name."""
    config: Values

    @property
    def folder(self) -> str:
        """The name of the checkpoint's folder."""
        return _folder(self.step)


def _folder(step: int) -> str:
    return f"step_{step:06d}"


def _step(folder: str) -> int:
    return int(folder.removeprefix("step_"))


def _folders(parent: str) -> list[str]:
    """Return the names of the checkpoints' folders, complete or not."""
    return [name for name in storage.names(parent) if re.fullmatch(r"step_\d+", name)]


# ---- find


def complete(run_uri: str) -> list[Manifest]:
    """Return the run's complete checkpoints, newest first; log a warning for each incomplete one.

    Raises:
        ValueError: all finished checkpoints are damaged; to start over would lose the run.
    """
    parent = storage.join(run_uri, "checkpoints")
    found, damaged = [], []
    for name in _folders(parent):
        try:
            found.append(_manifest(storage.join(parent, name)))
        except FileNotFoundError:
            logger.warning(
                "checkpoint %s is skipped: it has no manifest.json, so it was never finished", name
            )
        except ValueError as problem:
            logger.warning("checkpoint %s is skipped: %s", name, problem)
            damaged.append(f"{name}: {problem}")
    if damaged and not found:
        raise ValueError(_all_damaged(run_uri, damaged))
    return sorted(found, key=lambda manifest: manifest.step, reverse=True)


def _all_damaged(run_uri: str, problems: list[str]) -> str:
    return (
        f"every checkpoint below {run_uri}/checkpoints is damaged ({'; '.join(problems)}): "
        "restore one, or start a new run with another --run.name"
    )


def _manifest(uri: str) -> Manifest:
    """Read a checkpoint's manifest and check the sizes of its files.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the checkpoint is damaged.
    """
    sizes = storage.files(uri)
    if MANIFEST not in sizes:
        raise FileNotFoundError(uri)
    values = storage.read_json(storage.join(uri, MANIFEST))
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(
            f"its manifest.json does not have format {FORMAT}, the one that this version of "
            "raykiln reads"
        )
    try:
        manifest = Manifest(**values)
    except TypeError as error:
        raise ValueError(f"its manifest.json is damaged ({error})") from None
    for file, entry in manifest.files.items():
        if sizes.get(file) != entry["bytes"]:
            raise ValueError(
                f"{file} should have {entry['bytes']} bytes and has {sizes.get(file, 'none')}"
            )
    return manifest


def newest(run_uri: str) -> Manifest | None:
    """Return the newest complete checkpoint, or None."""
    return next(iter(complete(run_uri)), None)


def best(manifests: list[Manifest]) -> list[Manifest]:
    """Return the evaluated checkpoints, the best first; of two with equal scores the later one."""
    scored = [(one.score, -one.step, one) for one in manifests if one.score is not None]
    return [one for *_, one in sorted(scored, key=lambda entry: entry[:2])]


# ---- read


class Part(Mapping[str, torch.Tensor]):
    """A part's tensors by name, on the CPU. Each access reads the tensor from its files and joins
    its shards.

    Args:
        files: the part's safetensors files.
        owner: an object that lives as long as the part, e.g. the folder of a downloaded copy.
    """

    def __init__(self, files: list[Path], owner: object = None) -> None:
        self._owner = owner
        # By tensor: the files that hold it, each with the shard's "start" and "shape".
        self._sources: dict[str, list[tuple[Any, dict[str, Any] | None]]] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            shards = json.loads((file.metadata() or {}).get("shards", "{}"))
            for name in file.keys():  # noqa: SIM118  # it cannot be iterated over itself
                self._sources.setdefault(name, []).append((file, shards.get(name)))

    def __getitem__(self, name: str) -> torch.Tensor:
        sources = self._sources[name]
        file, shard = sources[0]
        first: torch.Tensor = file.get_tensor(name)
        if shard is None:
            return first
        whole = torch.empty(torch.Size(shard["shape"]), dtype=first.dtype)
        filled = 0
        for file, shard in sources:
            assert shard is not None, f"{name} is a shard in one file and whole in another"
            values = file.get_tensor(name)
            whole.view(-1)[shard["start"] : shard["start"] + values.numel()] = values
            filled += values.numel()
        if filled != whole.numel():
            raise ValueError(f"{name}: the shards have {filled} of {whole.numel()} elements")
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def read(run_uri: str, manifest: Manifest) -> State:
    """Read a checkpoint's state: tensors as `Part`s, the rest as dicts.

    The hash of every file is checked first.

    Raises:
        ValueError: a file is missing or damaged; names it.
    """
    uri = storage.join(run_uri, "checkpoints", manifest.folder)
    folder, owner = storage.local_path(uri), None
    if folder is None:
        owner = tempfile.TemporaryDirectory(prefix="raykiln-checkpoint-")
        folder = Path(owner.name)
        storage.download(uri, folder)
    parts: dict[str, list[Path]] = {}
    for file, entry in manifest.files.items():
        path = folder / file
        if not path.is_file() or storage.sha256(path) != entry["sha256"]:
            raise ValueError(f"{uri}/{file} is damaged: its hash is not the one in manifest.json")
        parts.setdefault(entry["part"], []).append(path)
    try:
        return {name: _read_part(files, owner) for name, files in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{uri} is damaged ({error})") from None


def _read_part(files: list[Path], owner: object) -> Mapping[str, object]:
    if files[0].suffix == ".json":
        values: dict[str, object] = storage.read_json(files[0])
        return values
    return Part(sorted(files), owner)


# ---- a run's checkpoints


class Checkpointer:
    """Save and load the checkpoints of one run; every worker has one and calls it alike.

    Args:
        run_uri: the run's folder on storage.
        config: the resolved config, kept in each manifest.
        strategy: the name of the `train.parallel.strategy.Strategy`, kept in each manifest.
        keep_last: how many of the newest are kept.
        keep_best: how many of those with the smallest score are kept besides.
        driver: the token that driver.json must hold while the workers of this driver may write;
            None: not checked.
        hooks: `files_uploaded` is called when a checkpoint's files are on storage and its
            manifest is not.
    """

    def __init__(
        self,
        run_uri: str,
        config: Values,
        strategy: str = "ddp",
        keep_last: int = 2,
        keep_best: int = 0,
        driver: str | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.run_uri, self.config, self.strategy, self.driver = run_uri, config, strategy, driver
        self.hooks = hooks or Hooks()
        self.keep_last, self.keep_best = keep_last, keep_best
        # The writer threads communicate while gradients are exchanged, so they need their own
        # process group.
        self._group: Any = (  # new_group's annotation includes an int
            dist.new_group(backend="gloo", timeout=UPLOAD_LIMIT) if self.world_size > 1 else None
        )
        self._writer: threading.Thread | None = None
        self._failure: str | None = None

    def load(self) -> tuple[int, State] | None:
        """Return the step and state of the newest complete and undamaged checkpoint, or None.

        Rank 0 chooses, and every rank reads the same one.

        Raises:
            Halt: all checkpoints are damaged.
            OSError: storage cannot be read.
        """
        found = self._on_all(lambda: complete(self.run_uri) if self.rank == 0 else [])[0]
        problems = []
        for manifest in found:
            state, problem = self._read(manifest)
            if state is not None:
                return manifest.step, state
            logger.warning("checkpoint %s is skipped: %s", manifest.folder, problem)
            problems.append(f"{manifest.folder}: {problem}")
        if problems:
            raise Halt(_all_damaged(self.run_uri, problems))
        return None

    def _read(self, manifest: Manifest) -> tuple[State | None, str | None]:
        """Return the state and None, or None and the damage; the same case on every worker.

        Raises:
            OSError: a worker could not read the files. That is no damage: to resume from an older
                checkpoint would lose steps.
        """
        state, damage, failure = None, None, None
        try:
            state = read(self.run_uri, manifest)
        except (ValueError, FileNotFoundError) as error:
            damage = str(error)
        except OSError as error:
            failure = str(error)
        results = self._gather((damage, failure))
        damages = [damage for damage, _ in results if damage]
        failures = [failure for _, failure in results if failure]
        if failures:
            raise OSError(
                f"checkpoint {manifest.folder} of {self.run_uri} could not be read: {failures[0]}"
            )
        return (None, damages[0]) if damages else (state, None)

    def save(self, step: int, state: State, score: float | None = None) -> None:
        """Copy `state` and write it in the background, after the checkpoint in flight.

        Every worker must call it. Rank 0 writes whole tensors and JSON, each worker its shards.

        Args:
            step: of the run.
            state: {part: {name: tensor or Shard}}, or {part: JSON}.
            score: on held-out data at this step, smaller is better.

        Raises:
            Halt: the checkpoint before could not be written.
        """
        self.join()
        copies = {part: copy for part, values in state.items() if (copy := self._copy(values))}
        self._writer = threading.Thread(
            target=self._write, args=(step, copies, score), name="checkpoint-writer", daemon=True
        )
        self._writer.start()

    def join(self) -> None:
        """Wait for the checkpoint in flight.

        Raises:
            Halt: one of the workers could not write it; the older ones are untouched.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise Halt(
                f"a checkpoint could not be written below {self.run_uri}/checkpoints ({failure}); "
                "the older ones are untouched"
            )

    def _copy(self, values: Mapping[str, object]) -> dict[str, object]:
        """Return a copy on the CPU of what this worker writes of a part; training changes the
        original meanwhile."""
        if not _is_tensors(values):
            return dict(values) if self.rank == 0 else {}
        return {
            name: _to_cpu(value)
            for name, value in values.items()
            if self.rank == 0 or isinstance(value, Shard)
        }

    # ---- in the background

    def _write(self, step: int, state: dict[str, dict[str, object]], score: float | None) -> None:
        """Write this worker's part of a checkpoint; keep the error for `join`."""
        uri = storage.join(self.run_uri, "checkpoints", _folder(step))
        try:
            self._on_all(lambda: self._clear(uri) if self.rank == 0 else None)
            try:
                files = self._on_all(lambda: self._upload(uri, state))
                self.hooks.files_uploaded(step)
                merged = {file: entry for part in files for file, entry in part.items()}
                manifest = Manifest(
                    FORMAT, step, self.world_size, self.strategy, score, merged, self.config
                )
                self._on_all(lambda: self._finish(uri, manifest) if self.rank == 0 else None)
            except ValueError:
                self._discard(uri)
                raise
            if self.rank == 0:
                self._prune(step)
        except Exception as failure:
            self._failure = str(failure) or repr(failure)

    def _clear(self, uri: str) -> None:
        """Delete what a killed attempt at this step has left."""
        self._check_driver()
        storage.delete(uri)

    def _upload(self, uri: str, state: dict[str, dict[str, object]]) -> dict[str, FileEntry]:
        """Write this worker's files; return their entries in the manifest."""
        files: dict[str, FileEntry] = {}
        with tempfile.TemporaryDirectory(prefix="raykiln-checkpoint-") as scratch:
            for part, values in state.items():
                path = self._write_part(Path(scratch), part, values)
                files[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": storage.sha256(path),
                    "part": part,
                }
            try:
                storage.upload(scratch, uri)
            except OSError:
                time.sleep(RETRY_S)  # object stores have transient errors
                storage.upload(scratch, uri)
        return files

    def _write_part(self, folder: Path, part: str, values: Mapping[str, object]) -> Path:
        """Write this worker's file of a part, and return its path."""
        if not _is_tensors(values):
            path = folder / f"{part}.json"
            storage.write_json(path, values)
            return path
        shards = {name: value for name, value in values.items() if isinstance(value, Shard)}
        tensors = {
            name: value.values if isinstance(value, Shard) else value
            for name, value in values.items()
        }
        if not shards:
            path = folder / f"{part}.safetensors"
            save_file(tensors, path)
            return path
        path = folder / f"{part}-{self.rank:05d}-of-{self.world_size:05d}.safetensors"
        positions = {
            name: {"start": shard.start, "shape": list(shard.shape)}
            for name, shard in shards.items()
        }
        save_file(tensors, path, metadata={"shards": json.dumps(positions)})
        return path

    def _finish(self, uri: str, manifest: Manifest) -> None:
        self._check_driver()
        storage.write_json(storage.join(uri, MANIFEST), asdict(manifest))

    def _discard(self, uri: str) -> None:
        """Delete an incomplete checkpoint, to free the space on a full disk. Every worker has
        ended its upload."""
        if self.rank == 0:
            with suppress(ValueError, OSError):
                self._check_driver()  # otherwise the folder belongs to the other driver
                storage.delete(uri)

    def _prune(self, step: int) -> None:
        """Delete checkpoints older than `step` that are not to be kept, and what killed attempts
        have left.

        Later steps are left alone: a run that went back to an older checkpoint has them, damaged,
        and will write them again.
        """
        parent = storage.join(self.run_uri, "checkpoints")
        try:
            found = [one for one in complete(self.run_uri) if one.step <= step]
            kept = [*found[: self.keep_last], *best(found)[: self.keep_best]]
            unfinished = [
                name
                for name in _folders(parent)
                if _step(name) < step and not storage.exists(storage.join(parent, name, MANIFEST))
            ]
            for name in [*(one.folder for one in found if one not in kept), *unfinished]:
                # The manifest first: without it the rest is not taken for a checkpoint.
                storage.delete(storage.join(parent, name, MANIFEST))
                storage.delete(storage.join(parent, name))
        except (ValueError, OSError) as problem:
            logger.warning("old checkpoints could not be deleted: %s", problem)

    def _check_driver(self) -> None:
        """Check that this driver still owns the run.

        Raises:
            ValueError: another driver took this one for dead and has resumed the run.
        """
        if self.driver is None:
            return
        owner = storage.read_json(storage.join(self.run_uri, "driver.json"))["token"]
        if owner != self.driver:
            raise ValueError("another driver has taken over this run")

    # ---- between the workers

    def _on_all(self, function: Callable[[], T]) -> list[T]:
        """Call `function` on every worker and return the results of all, by rank.

        Raises:
            ValueError: it failed on one worker; raised on every worker.
        """
        result: T | None = None
        problem: str | None = None
        try:
            result = function()
        except Exception as error:
            problem = str(error) or repr(error)
        outcomes = self._gather((result, problem))
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                raise ValueError(failed if len(outcomes) == 1 else f"worker {rank}: {failed}")
        return [cast(T, outcome) for outcome, _ in outcomes]

    def _gather(self, value: T) -> list[T]:
        """Return the values of all workers, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _is_tensors(values: Mapping[str, object]) -> TypeGuard[Mapping[str, torch.Tensor | Shard]]:
    return bool(values) and all(
        isinstance(value, (torch.Tensor, Shard)) for value in values.values()
    )


def _to_cpu(value: torch.Tensor | Shard) -> torch.Tensor | Shard:
    if isinstance(value, Shard):
        values = value.values.detach().to("cpu", copy=True).contiguous()
        return Shard(values, value.start, value.shape)
    return value.detach().to("cpu", copy=True).contiguous()

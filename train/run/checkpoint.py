"""Checkpoints: complete or not existing, written in the background, read at any number of workers by any strategy.

A checkpoint is a folder `checkpoints/step_000200/`. A part that is whole is one file, `model.safetensors`; a part that is
spread is one a worker, `model_optimizer-00001-of-00004.safetensors`, each tensor a run of the flattened whole whose place
is in the file's header. `manifest.json` comes last and names every file with its size and sha256. What has no valid
manifest is skipped aloud.
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
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluster import storage
from train.parallel.state import Halt, Shard, State
from train.run.hooks import Hooks

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 3  # raise it when a checkpoint's layout changes
RETRY_S = 1.0
UPLOAD_LIMIT = timedelta(hours=12)  # how long the workers wait for the slowest one's files


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself."""

    format: int
    step: int
    world_size: int
    strategy: str
    score: (
        float | None
    )  # on held-out data at this very step, the smaller the better; None: not judged
    files: dict[str, dict[str, Any]]
    config: dict[str, Any]

    @property
    def folder(self) -> str:
        return _folder(self.step)


def _folder(step: int) -> str:
    return f"step_{step:06d}"


def _step(folder: str) -> int:
    return int(folder.removeprefix("step_"))


def _folders(above: str) -> list[str]:
    """The names of the checkpoints' folders, finished or not."""
    return [name for name in storage.names(above) if re.fullmatch(r"step_\d+", name)]


# ---------------------------------------------------------------- which there are


def complete(run_uri: str) -> list[Manifest]:
    """The run's complete checkpoints, newest first; each one that is not is named in a warning.

    Raises:
        ValueError: there are finished checkpoints, and every one is damaged: to start over would lose the run.
    """
    above = storage.join(run_uri, "checkpoints")
    found, damaged = [], []
    for name in _folders(above):
        try:
            found.append(_manifest(storage.join(above, name)))
        except FileNotFoundError:
            log.warning(
                "checkpoint %s is skipped: it has no manifest.json, so it was never finished", name
            )
        except ValueError as problem:
            log.warning("checkpoint %s is skipped: %s", name, problem)
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
    present = storage.files(uri)
    if MANIFEST not in present:
        raise FileNotFoundError(uri)
    values = storage.read_json(storage.join(uri, MANIFEST))
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(
            f"its manifest.json is of another format than {FORMAT}, which this version of raykiln reads"
        )
    try:
        manifest = Manifest(**values)
    except TypeError as error:
        raise ValueError(f"its manifest.json is damaged ({error})") from None
    for file, facts in manifest.files.items():
        if present.get(file) != facts["bytes"]:
            raise ValueError(
                f"{file} should have {facts['bytes']} bytes and has {present.get(file, 'none')}"
            )
    return manifest


def newest(run_uri: str) -> Manifest | None:
    """The newest complete checkpoint of a run, None where none was ever finished."""
    return next(iter(complete(run_uri)), None)


def best(manifests: list[Manifest]) -> list[Manifest]:
    """Those that were judged, the best first; of equals the later one."""
    return sorted(
        (one for one in manifests if one.score is not None), key=lambda one: (one.score, -one.step)
    )


# ---------------------------------------------------------------- reading


class Part(Mapping[str, torch.Tensor]):
    """A part's tensors by name, on the CPU, each read (and put together from its shards) when it is asked for."""

    def __init__(self, files: list[Path], owner: Any = None) -> None:
        self._owner = owner  # keeps a downloaded copy alive
        self._places: dict[str, list[tuple[Any, dict[str, Any] | None]]] = {}
        for file in files:
            handle = safe_open(file, framework="pt")
            shards = json.loads((handle.metadata() or {}).get("shards", "{}"))
            for name in handle.keys():  # noqa: SIM118  # a handle is no dict
                self._places.setdefault(name, []).append((handle, shards.get(name)))

    def __getitem__(self, name: str) -> torch.Tensor:
        handle, shard = self._places[name][0]
        if shard is None:
            return handle.get_tensor(name)
        first = handle.get_tensor(name)
        whole = torch.empty(torch.Size(shard["shape"]), dtype=first.dtype)
        filled = 0
        for handle, place in self._places[name]:
            assert place is not None
            values = handle.get_tensor(name)
            whole.view(-1)[place["start"] : place["start"] + values.numel()] = values
            filled += values.numel()
        if filled != whole.numel():
            raise ValueError(f"{name}: the shards have {filled} of {whole.numel()} elements")
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read(run_uri: str, manifest: Manifest) -> State:
    """The state in a checkpoint: its tensors as `Part`s, the rest as dicts. Every hash is checked first.

    Raises:
        ValueError: names the file that is not what was written.
    """
    uri = storage.join(run_uri, "checkpoints", manifest.folder)
    folder, owner = storage.local_path(uri), None
    if folder is None:
        owner = tempfile.TemporaryDirectory(prefix="raykiln-checkpoint-")
        folder = Path(owner.name)
        storage.download(uri, folder)
    parts: dict[str, list[Path]] = {}
    for file, facts in manifest.files.items():
        if not (folder / file).is_file() or storage.sha256(folder / file) != facts["sha256"]:
            raise ValueError(f"{uri}/{file} is damaged: its hash is not the one in manifest.json")
        parts.setdefault(facts["part"], []).append(folder / file)
    try:
        return {
            part: storage.read_json(files[0])
            if files[0].suffix == ".json"
            else Part(sorted(files), owner)
            for part, files in parts.items()
        }
    except SafetensorError as error:
        raise ValueError(f"{uri} is damaged ({error})") from None


# ---------------------------------------------------------------- one run's


class Checkpointer:
    """Saves and loads the checkpoints of one run, on every worker alike.

    Args:
        run_uri: the run's folder on storage.
        config: the resolved config, kept in each manifest.
        strategy: the name of what spreads the work, kept in each manifest.
        keep_last: how many of the newest stay.
        keep_best: how many of those with the smallest score stay beside them.
        driver: the token that `driver.json` must hold while this driver's workers may write (None: not checked).
        hooks: `files_uploaded` is called when a checkpoint's files are on storage and its
            manifest is not.
    """

    def __init__(
        self,
        run_uri: str,
        config: dict[str, Any],
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
        # The writers agree in the background, beside the exchange of gradients: that needs a group of its own.
        self._group: Any = (
            dist.new_group(backend="gloo", timeout=UPLOAD_LIMIT) if self.world_size > 1 else None
        )
        self._writer: threading.Thread | None = None
        self._failure: str | None = None

    def load(self) -> tuple[int, State] | None:
        """The step and state of the newest checkpoint that is complete and undamaged; None where the run has none.

        Rank 0 chooses and every rank reads the same one.

        Raises:
            ValueError: there are checkpoints, and every one is damaged.
        """
        found = self._agree(lambda: complete(self.run_uri) if self.rank == 0 else [])[0]
        problems = []
        for manifest in found:
            state, problem = self._read(manifest)
            if state is not None:
                return manifest.step, state
            log.warning("checkpoint %s is skipped: %s", manifest.folder, problem)
            problems.append(f"{manifest.folder}: {problem}")
        if problems:
            raise Halt(_all_damaged(self.run_uri, problems))
        return None

    def _read(self, manifest: Manifest) -> tuple[State | None, str | None]:
        """The state, or what is wrong with it, the same on every worker.

        Raises:
            OSError: a worker could not read it, which says nothing of the checkpoint: an older one would be the wrong answer.
        """
        state, damage, trouble = None, None, None
        try:
            state = read(self.run_uri, manifest)
        except (ValueError, FileNotFoundError) as error:
            damage = str(error)
        except OSError as error:
            trouble = str(error)
        damages, troubles = zip(*self._gather((damage, trouble)), strict=True)
        if any(troubles):
            raise OSError(
                f"checkpoint {manifest.folder} of {self.run_uri} could not be read: {next(filter(None, troubles))}"
            )
        return (None, next(filter(None, damages))) if any(damages) else (state, None)

    def save(self, step: int, state: State, score: float | None = None) -> None:
        """Takes a copy of `state` now and writes it in the background, after the one in flight. Every worker calls it.

        Args:
            step: of the run.
            state: {part: {name: tensor or Shard}}, or {part: what JSON can hold}. Whole parts are written by rank 0,
                shards by each worker.
            score: on held-out data at this step, the smaller the better.

        Raises:
            Halt: the one before could not be written.
        """
        self.join()
        mine = {part: copy for part, values in state.items() if (copy := self._mine(values))}
        self._writer = threading.Thread(
            target=self._write, args=(step, mine, score), name="checkpoint-writer", daemon=True
        )
        self._writer.start()

    def join(self) -> None:
        """Waits for the checkpoint in flight.

        Raises:
            Halt: it could not be written, on any of the workers; the older ones are untouched.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise Halt(
                f"a checkpoint could not be written below {self.run_uri}/checkpoints ({failure}); the older ones are untouched"
            )

    def _mine(self, values: dict[str, Any]) -> dict[str, Any]:
        """A copy on the CPU of what this worker writes of a part: training goes on meanwhile."""
        if not _is_tensors(values):
            return dict(values) if self.rank == 0 else {}
        return {
            name: _to_cpu(value)
            for name, value in values.items()
            if self.rank == 0 or isinstance(value, Shard)
        }

    # ------------------------------------------------------------ in the background

    def _write(self, step: int, mine: State, score: float | None) -> None:
        uri = storage.join(self.run_uri, "checkpoints", _folder(step))
        try:
            self._agree(lambda: self._clear(uri) if self.rank == 0 else None)
            try:
                files = self._agree(lambda: self._upload(uri, mine))
                self.hooks.files_uploaded(step)
                merged = {file: facts for part in files for file, facts in part.items()}
                manifest = Manifest(
                    FORMAT, step, self.world_size, self.strategy, score, merged, self.config
                )
                self._agree(lambda: self._finish(uri, manifest) if self.rank == 0 else None)
            except ValueError:
                self._discard(uri)
                raise
            if self.rank == 0:
                self._prune(step)
        except Exception as failure:
            self._failure = str(failure) or repr(failure)

    def _discard(self, uri: str) -> None:
        """Half a checkpoint is worth less than the room it takes on a full disk. Every worker has ended its upload."""
        if self.rank == 0:
            with suppress(ValueError, OSError):
                self._refuse_if_overtaken()  # then it is the other driver's
                storage.delete(uri)

    def _agree(self, act: Callable[[], Any]) -> list[Any]:
        """What `act` gave on each worker; where it failed on one, all fail with that sentence."""
        try:
            outcome, problem = act(), None
        except Exception as error:
            outcome, problem = None, str(error) or repr(error)
        outcomes = self._gather((outcome, problem))
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                raise ValueError(failed if len(outcomes) == 1 else f"worker {rank}: {failed}")
        return [outcome for outcome, _ in outcomes]

    def _clear(self, uri: str) -> None:
        """What a killed attempt at this step left is no part of it."""
        self._refuse_if_overtaken()
        storage.delete(uri)

    def _upload(self, uri: str, mine: State) -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory(prefix="raykiln-checkpoint-") as scratch:
            for part, values in mine.items():
                path = self._write_part(Path(scratch), part, values)
                files[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": storage.sha256(path),
                    "part": part,
                }
            try:
                storage.upload(scratch, uri)
            except OSError:
                time.sleep(RETRY_S)  # a store may stumble once
                storage.upload(scratch, uri)
        return files

    def _write_part(self, folder: Path, part: str, values: dict[str, Any]) -> Path:
        if not _is_tensors(values):
            storage.write_json(folder / f"{part}.json", values)
            return folder / f"{part}.json"
        shards = {name: value for name, value in values.items() if isinstance(value, Shard)}
        places = {
            name: {"start": value.start, "shape": list(value.shape)}
            for name, value in shards.items()
        }
        path = folder / (
            f"{part}-{self.rank:05d}-of-{self.world_size:05d}.safetensors"
            if shards
            else f"{part}.safetensors"
        )
        tensors = {
            name: value.values if isinstance(value, Shard) else value
            for name, value in values.items()
        }
        save_file(tensors, path, metadata={"shards": json.dumps(places)} if shards else None)
        return path

    def _finish(self, uri: str, manifest: Manifest) -> None:
        self._refuse_if_overtaken()
        storage.write_json(storage.join(uri, MANIFEST), asdict(manifest))

    def _prune(self, step: int) -> None:
        """Deletes what is older than the checkpoint of `step` and not to be kept: others, and what a killed attempt left.

        Those of later steps are none of its business: a run that went back has them, damaged, and will write them again.
        """
        above = storage.join(self.run_uri, "checkpoints")
        try:
            found = [one for one in complete(self.run_uri) if one.step <= step]
            kept = [*found[: self.keep_last], *best(found)[: self.keep_best]]
            unfinished = [
                name
                for name in _folders(above)
                if _step(name) < step and not storage.exists(storage.join(above, name, MANIFEST))
            ]
            for name in [*(one.folder for one in found if one not in kept), *unfinished]:
                storage.delete(
                    storage.join(above, name, MANIFEST)
                )  # first: what is left of it is no checkpoint
                storage.delete(storage.join(above, name))
        except (ValueError, OSError) as problem:
            log.warning("old checkpoints could not be deleted: %s", problem)

    def _refuse_if_overtaken(self) -> None:
        """A driver that was thought dead must not write into the run that another goes on with."""
        if self.driver is None:
            return
        owner = storage.read_json(storage.join(self.run_uri, "driver.json"))["token"]
        if owner != self.driver:
            raise ValueError("another driver has taken over this run")

    # ------------------------------------------------------------ between the workers

    def _gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _is_tensors(values: dict[str, Any]) -> bool:
    return bool(values) and all(
        isinstance(value, (torch.Tensor, Shard)) for value in values.values()
    )


def _to_cpu(value: torch.Tensor | Shard) -> torch.Tensor | Shard:
    if isinstance(value, Shard):
        return Shard(
            value.values.detach().to("cpu", copy=True).contiguous(), value.start, value.shape
        )
    return value.detach().to("cpu", copy=True).contiguous()

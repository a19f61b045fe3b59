"""Checkpoints: complete or not existing, written in the background, read at any number of workers.

A checkpoint is a folder `checkpoints/step_000200/`; `manifest.json` in it comes last and names every file with
its size and sha256. What has no valid manifest is skipped aloud.
"""

import logging
import os
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from models import storage

log = logging.getLogger(__name__)

State = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself."""

    step: int
    world_size: int
    strategy: str
    files: dict[str, dict[str, Any]]
    config: dict[str, Any]

    @property
    def folder(self) -> str:
        return f"step_{self.step:06d}"


def complete(run_uri: str) -> list[Manifest]:
    """The run's complete checkpoints, newest first; each one that is not is named in a warning."""
    above = storage.join(run_uri, "checkpoints")
    found = []
    for name in storage.names(above):
        if not name.startswith("step_"):
            continue
        try:
            found.append(_manifest(storage.join(above, name)))
        except ValueError as problem:
            log.warning("checkpoint %s is skipped: %s", name, problem)
    return sorted(found, key=lambda manifest: manifest.step, reverse=True)


def _manifest(uri: str) -> Manifest:
    present = storage.files(uri)
    if "manifest.json" not in present:
        raise ValueError("it has no manifest.json, so it was never finished")
    try:
        manifest = Manifest(**storage.read_json(storage.join(uri, "manifest.json")))
    except TypeError as error:
        raise ValueError(f"its manifest.json is of another format ({error})") from None
    for file, facts in manifest.files.items():
        if present.get(file) != facts["bytes"]:
            raise ValueError(f"{file} should have {facts['bytes']} bytes and has {present.get(file, 'none')}")
    return manifest


def newest(run_uri: str) -> Manifest | None:
    """The newest complete checkpoint of a run, None where there is none."""
    return next(iter(complete(run_uri)), None)


def fetch(run_uri: str, manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Copies a checkpoint's files into a local folder and checks every hash.

    Raises:
        ValueError: names the file that is not what was written.
    """
    uri = storage.join(run_uri, "checkpoints", manifest.folder)
    storage.download(uri, folder)
    for file, facts in manifest.files.items():
        if storage.sha256(Path(folder) / file) != facts["sha256"]:
            raise ValueError(f"{uri}/{file} is damaged: its hash is not the one in manifest.json")


def read(folder: str | os.PathLike[str], manifest: Manifest) -> State:
    """The state in a fetched checkpoint, on the CPU: {"model": {...}, "optimizer": {...}, ...}."""
    state: State = {}
    for file in manifest.files:
        path, part = Path(folder) / file, Path(file).stem
        state[part] = load_file(path) if file.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
    return state


class Checkpointer:
    """Saves and loads the checkpoints of one run, on every worker alike.

    Args:
        run_uri: the run's folder on storage.
        config: the resolved config, kept in each manifest.
        keep_last: how many checkpoints stay.
        driver: the token that `driver.json` must hold while this driver's workers may write (None: not checked).
    """

    def __init__(self, run_uri: str, config: dict[str, Any], strategy: str = "ddp", keep_last: int = 2, driver: str | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.run_uri, self.config, self.strategy, self.keep_last, self.driver = run_uri, config, strategy, keep_last, driver
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def load(self) -> tuple[int, State] | None:
        """The step and state of the newest checkpoint that is complete and undamaged; None where the run has none.

        Rank 0 chooses and every rank reads the same one.

        Raises:
            ValueError: there are checkpoints, and every one is damaged.
        """
        found = complete(self.run_uri) if self.rank == 0 else []
        if self.world_size > 1:
            box: list[Any] = [[asdict(manifest) for manifest in found]]
            dist.broadcast_object_list(box, src=0)
            found = [Manifest(**values) for values in box[0]]
        for manifest in found:
            with tempfile.TemporaryDirectory(prefix="raykiln-checkpoint-") as folder:
                problem = None
                try:
                    fetch(self.run_uri, manifest, folder)
                except ValueError as found_problem:
                    problem = found_problem
                if self._all(problem is None):
                    return manifest.step, read(folder, manifest)
                log.warning("checkpoint %s is skipped: %s", manifest.folder, problem or "another worker could not read it")
        if found:
            raise ValueError(
                f"every checkpoint below {self.run_uri}/checkpoints is damaged: restore one, or start a new run with another --run.name"
            )
        return None

    def _all(self, good: bool) -> bool:
        """Whether it is good on every worker: all go on from the same checkpoint."""
        if self.world_size == 1:
            return good
        verdicts: list[bool] = [False] * self.world_size
        dist.all_gather_object(verdicts, good)
        return all(verdicts)

    def save(self, step: int, state: State) -> None:
        """Takes a copy of `state` now and writes it in the background, after the one in flight.

        Only rank 0 writes: under DDP the state is the same everywhere. A part that is a flat dict of tensors
        becomes `<part>.safetensors`, any other `<part>.pt` (loadable with weights_only=True).
        """
        self.join()
        if self.rank != 0:
            return
        copy = _to_cpu(state)
        self._writer = threading.Thread(target=self._write, args=(step, copy), name="checkpoint-writer", daemon=True)
        self._writer.start()

    def join(self) -> None:
        """Waits for the checkpoint in flight.

        Raises:
            ValueError: it could not be written; the older ones are untouched.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise ValueError(
                f"a checkpoint could not be written below {self.run_uri}/checkpoints ({failure}); the older ones are untouched"
            ) from failure

    def _write(self, step: int, state: State) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="raykiln-checkpoint-") as scratch:
                files = {}
                for part, values in state.items():
                    path = _write_part(Path(scratch), part, values)
                    files[path.name] = {"bytes": path.stat().st_size, "sha256": storage.sha256(path)}
                manifest = Manifest(step, self.world_size, self.strategy, files, self.config)
                uri = storage.join(self.run_uri, "checkpoints", manifest.folder)
                self._refuse_if_overtaken()
                storage.delete(uri)
                storage.upload(scratch, uri)
                self._refuse_if_overtaken()
                storage.write_json(storage.join(uri, "manifest.json"), asdict(manifest))
            for old in complete(self.run_uri)[self.keep_last :]:
                storage.delete(storage.join(self.run_uri, "checkpoints", old.folder))
        except BaseException as failure:
            self._failure = failure

    def _refuse_if_overtaken(self) -> None:
        """A driver that was thought dead must not write into the run that another goes on with."""
        if self.driver is None:
            return
        owner = storage.read_json(storage.join(self.run_uri, "driver.json"))["token"]
        if owner != self.driver:
            raise ValueError("another driver has taken over this run")


def _write_part(folder: Path, part: str, values: Any) -> Path:
    if isinstance(values, dict) and values and all(isinstance(value, torch.Tensor) for value in values.values()):
        path = folder / f"{part}.safetensors"
        save_file(values, path)
    else:
        path = folder / f"{part}.pt"
        torch.save(values, path)
    return path


def _to_cpu(value: Any) -> Any:
    """A deep copy with every tensor contiguous on the CPU: training goes on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value

"""What a registry holds of a model that is served: all its versions, for the page to set side by side. No Ray; nothing is written.

The registry may be on a storage that is slow or away: it is read on threads of its own, once for all who ask at a time, and for a bounded time.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

from cluster import storage
from models import bundle, registry
from serve.errors import Unavailable, UnknownModel
from serve.schemas import ModelVersion

Found = TypeVar("Found")

AGE_S = 10.0  # of what was read
FAILURE_AGE_S = 2.0  # of a failure to
TIMEOUT_S = 10.0
AWAY = "the registry's storage does not answer just now: try again in a moment"

logger = logging.getLogger(__name__)


class Catalog:
    """Registries as the ingress sees them (`serve.routes.Catalog`)."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(2, "registry")
        self._reads: dict[tuple[Any, ...], asyncio.Future[Any]] = {}  # by what is read, or was
        self._ended: dict[tuple[Any, ...], float] = {}

    async def versions(self, root: str, name: str) -> list[ModelVersion]:
        """A model's complete versions, newest first; read again once it is `AGE_S` that they were.

        Raises:
            Unavailable: the registry's storage does not answer.
        """
        listed = await self._read(registry.listed, root, name)
        return [
            _described(manifest, name, version, listed)
            for version, manifest in reversed(listed.versions.items())
        ]

    async def sample(self, root: str, name: str, version: int) -> tuple[str, bytes]:
        """What a version made at its export: of which kind it is, and its sample.

        Raises:
            UnknownModel: there is no such version, or it has no sample that is as published.
            Unavailable: the registry's storage does not answer.
        """
        manifest = (await self._read(registry.listed, root, name)).versions.get(version)
        if manifest is None or not _has_sample(manifest):
            raise UnknownModel(
                f"there is no sample of {name}/{version}: see /v1/models/{name}/versions"
            )
        made = await self._read(_sample, storage.join(root, name, str(version)), manifest["sha256"])
        if made is None:
            raise UnknownModel(
                f"the sample of {name}/{version} is missing or damaged: export the run again"
            )
        return manifest["kind"], made

    async def _read(self, function: Callable[..., Found], *arguments: Any) -> Found:
        key, now = (function, *arguments), time.monotonic()
        for old in [
            old for old, ended in self._ended.items() if now - ended >= _age_s(self._reads[old])
        ]:
            del self._reads[old], self._ended[old]
        if key not in self._reads:
            self._reads[key] = asyncio.get_running_loop().run_in_executor(
                self._executor, function, *arguments
            )
            self._reads[key].add_done_callback(
                lambda _: self._ended.update({key: time.monotonic()})
            )
        shared: Awaitable[Found] = asyncio.shield(self._reads[key])
        try:
            return await asyncio.wait_for(shared, self.timeout_s)
        except OSError as error:  # a TimeoutError is one
            logger.warning("the registry cannot be read: %r", error)
            raise Unavailable(AWAY) from error


def _age_s(read: asyncio.Future[Any]) -> float:
    """How old an outcome may get."""
    return FAILURE_AGE_S if read.cancelled() or read.exception() else AGE_S


def _sample(uri: str, sha256: str) -> bytes | None:
    """The sample of the bundle at `uri` whose manifest has that hash; None where it is not as published."""
    try:
        manifest = bundle.read(uri)
        return (
            bundle.read_file(uri, manifest, bundle.SAMPLES[manifest["kind"]])
            if manifest["sha256"] == sha256
            else None
        )
    except ValueError:
        return None


def _described(
    manifest: bundle.Manifest, name: str, version: int, listed: registry.Listed
) -> ModelVersion:
    return ModelVersion(
        id=name,
        version=version,
        kind=manifest["kind"],
        created=int(datetime.fromisoformat(manifest["created"]).timestamp()),
        aliases=listed.aliases_of(version),
        metrics=manifest["metrics"],
        quantization=manifest["quantization"],
        run={key: manifest["run"][key] for key in ("name", "step")},
        dataset=manifest["dataset"],
        commit=manifest["commit"],
        sample=_has_sample(manifest),
    )


def _has_sample(manifest: bundle.Manifest) -> bool:
    return bundle.SAMPLES[manifest["kind"]] in manifest["files"]

"""All versions in the registry of a model that is served, for /v1/models/NAME/versions.

The registry's storage may be slow or unreachable. It is read on separate threads, once for all
concurrent requests, and for a bounded time. No Ray, and nothing is written.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cluster import storage
from models import bundle, registry
from serve.errors import Unavailable, UnknownModel
from serve.http.schemas import ModelVersion

Result = TypeVar("Result")

MAX_AGE_S = 10.0  # of a result
FAILURE_MAX_AGE_S = 2.0
TIMEOUT_S = 10.0
UNREACHABLE = "the registry's storage does not answer at the moment: try again in a moment"

logger = logging.getLogger(__name__)


class Catalog:
    """Registries, as the routes read them (`serve.http.protocols.Catalog`)."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(2, "registry")
        # Reads that are running or finished, and when they finished; by function and arguments.
        self._reads: dict[tuple[object, ...], asyncio.Future[Any]] = {}
        self._ended: dict[tuple[object, ...], float] = {}

    async def versions(self, root: str, name: str) -> list[ModelVersion]:
        """Return a model's complete versions, newest first, at most `MAX_AGE_S` old.

        Raises:
            Unavailable: the registry's storage does not answer.
        """
        listed = await self._read(registry.listed, root, name)
        return [
            _model_version(manifest, name, version, listed)
            for version, manifest in reversed(listed.versions.items())
        ]

    async def sample(self, root: str, name: str, version: int) -> tuple[str, bytes]:
        """Return the kind of a version's model, and the sample in its bundle.

        Raises:
            UnknownModel: there is no such version, or its sample is missing or damaged.
            Unavailable: the registry's storage does not answer.
        """
        manifest = (await self._read(registry.listed, root, name)).versions.get(version)
        if manifest is None or not _has_sample(manifest):
            raise UnknownModel(
                f"there is no sample of {name}/{version}: see /v1/models/{name}/versions"
            )
        uri = storage.join(root, name, str(version))
        sample = await self._read(_sample, uri, manifest["sha256"])
        if sample is None:
            raise UnknownModel(
                f"the sample of {name}/{version} is missing or damaged: export the run again"
            )
        return manifest["kind"], sample

    async def _read(self, function: Callable[..., Result], *arguments: Any) -> Result:
        key, now = (function, *arguments), time.monotonic()
        outdated = [
            old for old, ended in self._ended.items() if now - ended >= _max_age_s(self._reads[old])
        ]
        for old in outdated:
            del self._reads[old], self._ended[old]
        if key not in self._reads:
            self._reads[key] = asyncio.get_running_loop().run_in_executor(
                self._executor, function, *arguments
            )
            self._reads[key].add_done_callback(
                lambda _: self._ended.update({key: time.monotonic()})
            )
        shared: Awaitable[Result] = asyncio.shield(self._reads[key])
        try:
            return await asyncio.wait_for(shared, self.timeout_s)
        except OSError as error:  # includes TimeoutError
            logger.warning("the registry cannot be read: %r", error)
            raise Unavailable(UNREACHABLE) from error


def _max_age_s(read: asyncio.Future[Any]) -> float:
    return FAILURE_MAX_AGE_S if read.cancelled() or read.exception() else MAX_AGE_S


def _sample(uri: str, sha256: str) -> bytes | None:
    """Return the sample of the bundle at `uri`; None if it is damaged.

    Args:
        sha256: of the manifest when the versions were listed.
    """
    try:
        manifest = bundle.read(uri)
        if manifest["sha256"] != sha256:
            return None
        return bundle.read_file(uri, manifest, bundle.SAMPLES[manifest["kind"]])
    except ValueError:
        return None


def _model_version(
    manifest: bundle.Manifest, name: str, version: int, listed: registry.Listed
) -> ModelVersion:
    return ModelVersion(
        id=name,
        version=version,
        kind=manifest["kind"],
        created=bundle.created(manifest),
        aliases=listed.aliases_of(version),
        metrics=manifest["metrics"],
        quantization=manifest["quantization"],
        run=bundle.public_run(manifest),
        dataset=manifest["dataset"],
        commit=manifest["commit"],
        sample=_has_sample(manifest),
    )


def _has_sample(manifest: bundle.Manifest) -> bool:
    return bundle.SAMPLES[manifest["kind"]] in manifest["files"]

"""What the registry holds of the models that are served: all their versions, for the page to set side by side. No Ray; nothing is written."""

import asyncio
import time
from datetime import datetime

from models import bundle, registry, storage
from serve.errors import Unavailable, UnknownModel
from serve.schemas import ModelVersion

AGE_S = 10.0  # every open page asks


class Catalog:
    """The registries as the ingress sees them (`serve.ingress.Catalog`); at first none."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.look_in({})

    def look_in(self, roots: dict[str, str]) -> None:
        """From now on in these, by name of the model."""
        self._roots, self._seen = roots, dict[str, tuple[float, registry.Listed]]()

    async def versions(self, name: str) -> list[ModelVersion]:
        """A model's complete versions, newest first, at most `AGE_S` old.

        Raises:
            UnknownModel: it is not known where the model's registry is.
            Unavailable: the registry's storage does not answer.
        """
        listed = await self._listed(name)
        return [_described(manifest, name, version, listed) for version, manifest in reversed(listed.versions.items())]

    async def sample(self, name: str, version: int) -> tuple[str, bytes]:
        """What a version made at its export: of which kind it is, and its sample.

        Raises:
            UnknownModel: there is no such version, or it has no sample that is as published.
            Unavailable: the registry's storage does not answer.
        """
        manifest = (await self._listed(name)).versions.get(version)
        if manifest is None or not _has_sample(manifest):
            raise UnknownModel(f"there is no sample of {name}/{version}: see /v1/models/{name}/versions")
        uri = storage.join(self._roots[name], name, str(version))
        try:
            return manifest["kind"], await asyncio.to_thread(bundle.read_file, uri, manifest, bundle.SAMPLES[manifest["kind"]])
        except ValueError as error:
            raise UnknownModel(f"the sample of {name}/{version} is damaged: see /v1/models/{name}/versions") from error
        except OSError as error:
            raise Unavailable("the registry's storage does not answer just now: try again in a moment") from error

    async def _listed(self, name: str) -> registry.Listed:
        if name not in self._roots:
            raise UnknownModel(f"the registry of {name} is not known here: see /v1/models for what is served")
        async with self._lock:
            root, seen = self._roots[name], self._seen  # whatever `look_in` does meanwhile
            seen_at, listed = seen.get(name, (-AGE_S, None))
            if listed is None or time.monotonic() - seen_at >= AGE_S:
                try:
                    listed = await asyncio.to_thread(registry.listed, root, name)
                except OSError as error:
                    raise Unavailable("the registry's storage does not answer just now: try again in a moment") from error
                seen[name] = time.monotonic(), listed
        return listed


def _described(manifest: bundle.Manifest, name: str, version: int, listed: registry.Listed) -> ModelVersion:
    return ModelVersion(
        id=name,
        version=version,
        created=int(datetime.fromisoformat(manifest["created"]).timestamp()),
        aliases=listed.aliases_of(version),
        metrics=manifest["metrics"],
        quantization=manifest["quantization"],
        run=manifest["run"],
        dataset=manifest["dataset"],
        commit=manifest["commit"],
        sample=_has_sample(manifest),
    )


def _has_sample(manifest: bundle.Manifest) -> bool:
    return bundle.SAMPLES[manifest["kind"]] in manifest["files"]

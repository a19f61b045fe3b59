"""Which bundles of a registry are served."""

import logging
from dataclasses import dataclass

from cluster import storage
from models import bundle, registry
from serve.session import ImageSession, TextSession, open_bundle

KINDS = {"text": "gpt", "image": "gan"}  # the kind of model of each modality

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectedBundle:
    """A verified bundle to serve."""

    name: str
    version: int
    uri: str
    manifest: bundle.Manifest

    @property
    def reference(self) -> str:
        return f"{self.name}/{self.version}"


def select(
    root: str,
    text: str | None = None,
    image: str | None = None,
    providers: list[str] | None = None,
) -> dict[str, SelectedBundle]:
    """Select and verify the bundles to serve.

    Args:
        root: the registry, `<storage>/models`.
        text, image: references such as gpt, gpt/3 or gpt@production; by default the model of the
            kind whose alias production is set, or else the newest.
        providers: execution providers to open the bundles with (`models.runtime.PROVIDERS`); by
            default the best that this machine has.

    Returns:
        By modality ("text", "image"), without those of which the registry has no model.

    Raises:
        ValueError: there is nothing to serve, a reference is unknown or of the wrong kind, a bundle
            is damaged or its outputs differ from the recorded ones, or this machine does not have a
            provider.
    """
    root = storage.absolute(root)  # replicas run in other folders
    given = {"text": text, "image": image}
    references = {
        modality: reference for modality, reference in given.items() if reference is not None
    }
    if len(references) < len(KINDS):
        references = _defaults(root) | references
    if not references:
        raise ValueError(
            f"{root} holds no model to serve: train one and export it with "
            "`python -m train export RUN`"
        )
    return {
        modality: _verified(root, modality, reference, providers)
        for modality, reference in references.items()
    }


def _defaults(root: str) -> dict[str, str]:
    """Return, by modality, the name to serve; names that cannot be resolved are skipped."""
    candidates: dict[str, list[tuple[bool, str, str]]] = {}
    for name in registry.names(root):
        try:
            manifest = bundle.read(registry.resolve(root, name)[2])
            in_production = registry.PRODUCTION in registry.aliases(root, name)
        except ValueError as error:
            logger.warning("%s is skipped: %s", name, error)
            continue
        candidate = (in_production, manifest["created"], name)
        candidates.setdefault(manifest["kind"], []).append(candidate)
    return {
        modality: max(candidates[kind])[2] for modality, kind in KINDS.items() if kind in candidates
    }


def _verified(
    root: str, modality: str, reference: str, providers: list[str] | None
) -> SelectedBundle:
    """Open a bundle as a replica does.

    A bundle that cannot be opened would stop the replicas that serve now (`serve.launch.deploy`).
    """
    name, version, uri = registry.resolve(root, reference)
    manifest = bundle.read(uri)
    kind = KINDS[modality]
    if manifest["kind"] != kind:
        raise ValueError(
            f"--{modality} {reference} is a bundle of kind {manifest['kind']}: "
            f"give it one of kind {kind}"
        )
    try:
        if modality == "text":
            open_bundle(TextSession, uri, slots=1, providers=providers)
        else:
            open_bundle(ImageSession, uri, providers=providers)
    except ValueError as error:
        raise ValueError(f"{name}/{version} cannot be served: {error}") from error
    return SelectedBundle(name, version, uri, manifest)

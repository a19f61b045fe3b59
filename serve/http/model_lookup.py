"""Which models respond, and which of them has a given name."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request

from serve.errors import UnknownModel
from serve.http.protocols import ServedModel
from serve.http.schemas import Model

Response = TypeVar("Response")

logger = logging.getLogger(__name__)


async def describe_models(http: Request) -> list[Model]:
    """Describe the models that respond; one that is unavailable does not hide the other.

    Raises:
        Exception: none responds; the exception of the first.
    """
    described, failures = await _call_all(http, lambda model: model.describe())
    if failures and not described:
        raise failures[0]
    for failure in failures:
        logger.warning("a model could not be described", exc_info=failure)
    return described


async def find_model(http: Request, name: str) -> Model:
    """Describe the served model of that name.

    Raises:
        UnknownModel: there is none.
        Exception: a model that may have this name does not respond.
    """
    described, failures = await _call_all(http, lambda model: model.describe())
    for model in described:
        if model.id == name:
            return model
    raise _not_found(name, [model.id for model in described], failures)


async def find_registry(http: Request, name: str) -> str:
    """Return the root of the registry from which the model of that name is served.

    Raises:
        UnknownModel: there is no such model, or its bundle is not in a registry.
        Exception: a model that may have this name does not respond.
    """
    found, failures = await _call_all(http, lambda model: model.registry())
    for known, root in found:
        if known == name and root is not None:
            return root
        if known == name:
            raise UnknownModel(
                f"{name} is served from a folder that is not in a registry, so only "
                f"/v1/models/{name} is known"
            )
    raise _not_found(name, [known for known, _ in found], failures)


def _not_found(name: str, known: list[str], failures: list[BaseException]) -> BaseException:
    """Return the error for a name that no responding model has.

    A model that did not respond may have the name: then its failure is the error.
    """
    if failures:
        return failures[0]
    return UnknownModel(f"model {name!r} is not served here: use {' or '.join(known)}")


async def _call_all(
    http: Request, method: Callable[[ServedModel], Awaitable[Response]]
) -> tuple[list[Response], list[BaseException]]:
    """Call all served models; return their responses, and the exceptions of those that failed."""
    served = [model for model in (http.app.state.text, http.app.state.images) if model is not None]
    results = await asyncio.gather(*(method(model) for model in served), return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    return [result for result in results if not isinstance(result, BaseException)], failures

"""Which models answer, and which of them has a given name."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request

from serve.errors import UnknownModel
from serve.http.protocols import ServedModel
from serve.http.schemas import Model

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


async def describe_models(http: Request) -> list[Model]:
    """Describe the models that answer; one that is unavailable does not hide the other.

    Raises:
        Exception: none answers; the exception of the first.
    """
    described, failures = await _ask_all(http, lambda model: model.describe())
    if failures and not described:
        raise failures[0]
    for failure in failures:
        logger.warning("a model could not be described", exc_info=failure)
    return described


async def find_model(http: Request, name: str) -> Model:
    """Describe the served model of that name.

    Raises:
        UnknownModel: there is none.
        Exception: a model that may have this name does not answer.
    """
    described, failures = await _ask_all(http, lambda model: model.describe())
    for model in described:
        if model.id == name:
            return model
    raise _not_found(name, [model.id for model in described], failures)


async def find_registry(http: Request, name: str) -> str:
    """Return the root of the registry from which the model of that name is served.

    Raises:
        UnknownModel: there is no such model, or its bundle is not in a registry.
        Exception: a model that may have this name does not answer.
    """
    found, failures = await _ask_all(http, lambda model: model.registry())
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
    """Return the error for a name that no answering model has.

    If a model did not answer, it may be the one: its failure is the error then.
    """
    if failures:
        return failures[0]
    return UnknownModel(f"model {name!r} is not served here: use {' or '.join(known)}")


async def _ask_all(
    http: Request, question: Callable[[ServedModel], Awaitable[Answer]]
) -> tuple[list[Answer], list[BaseException]]:
    """Ask all served models; return their answers, and the exceptions of those that failed."""
    served = [model for model in (http.app.state.text, http.app.state.images) if model is not None]
    answers = await asyncio.gather(*(question(model) for model in served), return_exceptions=True)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    return [answer for answer in answers if not isinstance(answer, BaseException)], failures

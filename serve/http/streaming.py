"""Completions in OpenAI's shape: one response, or server-sent events."""

import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Collection
from typing import Any

from fastapi import Request

from serve.errors import RequestError
from serve.http import exception_handlers
from serve.http.schemas import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from serve.text.chunks import Chunk

# The OpenAPI description of a stream, as FastAPI describes its own.
MESSAGE = {
    "type": "string",
    "contentMediaType": "application/json",
    "contentSchema": {
        "anyOf": [
            {"$ref": "#/components/schemas/Completion"},
            {"$ref": "#/components/schemas/Error"},
        ]
    },
}
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"anyOf": [{"const": "[DONE]"}, MESSAGE]}},
}
EVENT_STREAM: dict[str, Any] = {
    "description": "The whole text or, with `stream`, server-sent events.",
    "content": {
        "text/event-stream": {"itemSchema": EVENT, "example": "data: {...}\n\ndata: [DONE]\n\n"}
    },
}

logger = logging.getLogger(__name__)


class CompletionWriter:
    """Writes the completion of one request, or the messages of its stream, with a common ID."""

    def __init__(self, body: CompletionRequest) -> None:
        self.body = body
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    def completion(self, reference: str, chunks: list[Chunk], usage: Usage | None) -> Completion:
        """Return the completion of these chunks, one per choice.

        Args:
            reference: name and version of the model, such as gpt/3.
        """
        choices = [
            CompletionChoice(
                index=chunk.choice,
                text=chunk.text,
                finish_reason=chunk.finish_reason,  # type: ignore[arg-type]  # checked by Pydantic
                logprobs=None if self.body.logprobs is None else _logprobs(chunk),
            )
            for chunk in chunks
        ]
        return Completion(
            id=self.id,
            created=self.created,
            model=reference.rpartition("/")[0],
            system_fingerprint=reference,
            choices=choices,
            usage=usage,
        )

    async def events(
        self,
        http: Request,
        first: tuple[str, Chunk],
        chunks: AsyncGenerator[tuple[str, Chunk], None],
    ) -> AsyncGenerator[str, None]:
        """Yield the server-sent events of a stream.

        If the client disconnects, `chunks` is closed, which ends the generation.
        """
        body = self.body
        async with contextlib.aclosing(chunks):
            reference, chunk = first
            latest: dict[int, Chunk] = {}
            try:
                while True:
                    latest[chunk.choice] = chunk
                    finished = sum(one.finish_reason is not None for one in latest.values())
                    is_last = finished == body.n
                    so_far = usage(latest.values())
                    http.state.tokens = so_far.completion_tokens
                    send_usage = is_last or body.stream_options.continuous_usage_stats
                    message = self.completion(reference, [chunk], so_far if send_usage else None)
                    event = f"data: {message.model_dump_json()}\n\n"
                    if is_last:
                        break
                    yield event
                    reference, chunk = await anext(chunks)
            except RequestError as error:
                yield f"data: {json.dumps(exception_handlers.error_body(error))}\n\n"
                return
            except Exception:
                logger.exception("a stream failed")
                yield f"data: {json.dumps(exception_handlers.CRASH)}\n\n"
                return
            if body.stream_options.include_usage:
                event += f"data: {message.model_copy(update={'choices': []}).model_dump_json()}\n\n"
            # In one piece, because every piece costs Serve's proxy the same.
            yield event + "data: [DONE]\n\n"


def usage(latest: Collection[Chunk]) -> Usage:
    """Return a request's usage from the latest chunk of each choice; the prompt counts once."""
    prompt = max(chunk.prompt_tokens for chunk in latest)
    completion = sum(chunk.completion_tokens for chunk in latest)
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )


def _logprobs(chunk: Chunk) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[one.token for one in chunk.logprobs],
        token_logprobs=[one.logprob for one in chunk.logprobs],
        top_logprobs=[one.top for one in chunk.logprobs],
        text_offset=[one.offset for one in chunk.logprobs],
    )

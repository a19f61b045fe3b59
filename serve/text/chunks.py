"""Pieces of generated text, as the engine hands them out and the other layers pass them on."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability, and those of the most likely tokens at its position."""

    token: str  # as `serve.text.detokenize.token_text` writes it
    logprob: float
    top: dict[str, float]  # the most likely tokens and this one, most likely first
    offset: int  # of the token's first character in the text


@dataclass(frozen=True)
class Chunk:
    """The text that one of a request's choices has gained since its previous chunk."""

    text: str
    prompt_tokens: int
    completion_tokens: int  # in total, so far
    # "stop" (end of text, or a stop string), "length" or "content_filter"; None before the end.
    finish_reason: str | None = None
    choice: int = 0
    # If they were requested: one for each token since the previous chunk.
    logprobs: tuple[TokenLogprob, ...] = ()

    def __add__(self, later: "Chunk") -> "Chunk":
        return replace(later, text=self.text + later.text, logprobs=self.logprobs + later.logprobs)

"""From logits to the next token.

A draw is a function of (seed, choice, position): it is the same alone, in a batch or after a retry.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn, and where its text ends."""

    max_tokens: int = 16
    temperature: float = 0.7  # 0: greedy
    top_k: int = 50  # 0: off
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    choice: int = 0  # which text of the request; each draws differently from the same seed
    stop: tuple[str, ...] = ()
    # How many of the most likely tokens to report for each token; None: no log probabilities.
    logprobs: int | None = None


def penalize(
    logits: np.ndarray,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> np.ndarray:
    """Apply repetition, presence and frequency penalties.

    Args:
        logits: (V,).
        prompt: the token ids of the prompt.
        tokens: the token ids generated after it.
        repetition: above 1, makes all tokens of prompt and text less likely, below 1 more likely
            (CTRL, Keskar et al. 2019, https://arxiv.org/abs/1909.05858, as in transformers:
            positive logits are divided by it, negative ones multiplied).
        presence: subtracted from the logit of each token of the text (as OpenAI defines it).
        frequency: subtracted once per occurrence in the text (as OpenAI defines it).

    Returns:
        (V,) float64; `logits` itself if no penalty is set.

    Raises:
        ValueError: the repetition penalty is out of range.
    """
    if not 0.01 <= repetition <= 100:  # far outside this range, logits overflow
        raise ValueError(
            f"repetition is {repetition}: use 1 (no penalty), or a number from 0.01 to 100"
        )
    if (repetition, presence, frequency) == (1, 0, 0):
        return logits
    logits = logits.astype(np.float64)
    seen = np.unique([*prompt, *tokens])
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
    generated, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
    logits[generated] -= presence + frequency * counts
    return logits


def logprobs(logits: np.ndarray, token: int, count: int) -> tuple[float, dict[int, float]]:
    """Return a token's log probability, and those of the `count` most likely tokens and itself.

    Natural logarithms of the model's own probabilities: those of logits (V,) before penalties,
    temperature and filters. The most likely token comes first.
    """
    shifted = logits.astype(np.float64) - logits.max()
    values = shifted - np.log(np.exp(shifted).sum())
    top = np.argpartition(values, -count)[-count:] if count else np.empty(0, np.int64)
    top = top[np.argsort(-values[top], kind="stable")]
    return float(values[token]), {
        one: float(values[one]) for one in dict.fromkeys([*top.tolist(), token])
    }


def sample(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    choice: int = 0,
    position: int = 0,
) -> int:
    """Draw the next token.

    The filters are those of transformers, in the same order: temperature, then `top_k`, then
    `top_p` (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).

    Args:
        logits: (V,).
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens and those as likely as the k-th; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum; 1 keeps all.
        seed: together with `choice` and `position`, determines the draw; below 2**64.
        choice: which text of the request; each draws differently from the same seed.
        position: the new token's position in its text.

    Raises:
        ValueError: a parameter is out of range, or the highest logit is NaN or infinite.
    """
    _check(temperature, top_k, top_p, seed)
    highest = logits.max()  # NaN if any logit is
    if not np.isfinite(highest):
        raise ValueError(f"the highest logit is {highest}: no token can be drawn")
    if temperature == 0:
        return int(logits.argmax())
    # The maximum is subtracted first, so that a tiny temperature gives -inf and never NaN.
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - highest) / temperature
    if 0 < top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -top_k)[-top_k]] = -np.inf
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
    cumulative = np.cumsum(probabilities)
    # An explicit dtype: NumPy converts a list with a seed of 2**63 or more to floats.
    key = np.array([seed, position], np.uint64)
    counter = np.array([0, 0, 0, choice], np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key, counter=counter)).random() * cumulative[-1]
    return int(np.searchsorted(cumulative, draw, side="right"))


def _check(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature is {temperature}: use 0 (the most likely token) or more")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: use 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: use a number above 0 and up to 1")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: use a number from 0 to 2**64 - 1")

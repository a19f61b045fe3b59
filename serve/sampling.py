"""From logits to the next token. A draw is a function of (seed, choice, position): the same alone, in company and after a retry."""

from collections.abc import Sequence

import numpy as np


def penalize(
    logits: np.ndarray,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> np.ndarray:
    """The logits, with what has been written made less likely; the same array where no penalty is set.

    Args:
        logits: (V,).
        prompt: the ids of the prompt.
        tokens: those generated after it.
        repetition: above 1, takes likelihood from all tokens of prompt and text, below 1 it gives (CTRL, Keskar et al. 2019,
            https://arxiv.org/abs/1909.05858, as in transformers: a positive logit is divided by it, a negative one multiplied).
        presence: is taken off the logit of each token of the text (OpenAI's, like the next).
        frequency: is taken off as often as the token stands in the text.

    Raises:
        ValueError: a repetition penalty out of its range.
    """
    if not 0.01 <= repetition <= 100:  # far beyond, logits overflow
        raise ValueError(
            f"repetition is {repetition}: use 1 (no penalty), or a number from 0.01 to 100"
        )
    if (repetition, presence, frequency) == (1, 0, 0):
        return logits
    logits = logits.astype(np.float64)
    seen = np.unique([*prompt, *tokens])
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
    written, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
    logits[written] -= presence + frequency * counts
    return logits


def logprobs(logits: np.ndarray, token: int, count: int) -> tuple[float, dict[int, float]]:
    """The natural logarithm of a token's probability, and those of the `count` likeliest tokens and of itself, likeliest first.

    They are the model's own: of logits (V,) before penalties, temperature and filters.
    """
    shifted = logits.astype(np.float64) - logits.max()
    everything = shifted - np.log(np.exp(shifted).sum())
    likeliest = np.argpartition(everything, -count)[-count:] if count else np.empty(0, np.int64)
    likeliest = likeliest[np.argsort(-everything[likeliest], kind="stable")]
    return float(everything[token]), {
        one: float(everything[one]) for one in dict.fromkeys([*likeliest.tolist(), token])
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
    """The next token.

    The filters are transformers' own, in its order: temperature, then `top_k`, then `top_p` (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751).

    Args:
        logits: (V,).
        temperature: 0 takes the likeliest token.
        top_k: keep the k likeliest tokens and those as likely as the k-th; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all.
        seed: with `choice` and `position`, decides the draw; below 2**64.
        choice: which of a request's texts: each draws anew from the same seed.
        position: the new token's place in its sequence.

    Raises:
        ValueError: a parameter out of its range, or a logit that is NaN or infinite.
    """
    _check(temperature, top_k, top_p, seed)
    highest = logits.max()  # NaN where any is
    if not np.isfinite(highest):
        raise ValueError(f"the highest logit is {highest}: no token can be drawn")
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(
        over="ignore"
    ):  # the maximum is taken off first: a tiny temperature gives -inf, never NaN
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
    key = np.array(
        [seed, position], np.uint64
    )  # a list with a seed from 2**63 on would become floats
    counter = np.array([0, 0, 0, choice], np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key, counter=counter)).random() * cumulative[-1]
    return int(np.searchsorted(cumulative, draw, side="right"))


def _check(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature is {temperature}: use 0 (the likeliest token) or more")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: use 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: use a number above 0 and up to 1")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: use a number from 0 to 2**64 - 1")

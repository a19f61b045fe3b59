"""From logits to the next token. A draw is a function of (seed, position): the same alone, in company and after a retry."""

import numpy as np


def sample(logits: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, position: int = 0) -> int:
    """The next token.

    The filters are transformers' own, in its order: temperature, then `top_k`, then `top_p` (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751).

    Args:
        logits: (V,).
        temperature: 0 takes the likeliest token.
        top_k: keep the k likeliest tokens and those as likely as the k-th; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all.
        seed: with `position`, decides the draw; below 2**64.
        position: the new token's place in its sequence.

    Raises:
        ValueError: a parameter out of its range.
    """
    _check(temperature, top_k, top_p, seed)
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # the maximum is taken off first: a tiny temperature gives -inf, never NaN
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    if 0 < top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -top_k)[-top_k]] = -np.inf
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
    cumulative = np.cumsum(probabilities)
    key = np.array([seed, position], np.uint64)  # a list with a seed from 2**63 on would become floats
    draw = np.random.Generator(np.random.Philox(key=key)).random() * cumulative[-1]
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

"""Sampling and penalties against transformers and torch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve.text.sampling import logprobs, penalize, sample

LOGITS = np.random.default_rng(0).normal(0, 2, 50).astype(np.float32)


def frequencies(count: int = 4000, logits: np.ndarray = LOGITS, **parameters: Any) -> np.ndarray:
    """Return how often each token is drawn over `count` positions, (V,)."""
    tokens = [sample(logits, position=position, **parameters) for position in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.5},
        {"temperature": 0.7, "top_k": 10, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 1000},
    ],
)
def test_frequencies_equal_transformers_probabilities(parameters: dict[str, Any]) -> None:
    scores = torch.from_numpy(LOGITS)[None]
    scores = TemperatureLogitsWarper(parameters.get("temperature", 1.0))(None, scores)
    if "top_k" in parameters:
        scores = TopKLogitsWarper(int(parameters["top_k"]))(None, scores)
    if "top_p" in parameters:
        scores = TopPLogitsWarper(parameters["top_p"])(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    observed = frequencies(**parameters)
    assert set(np.flatnonzero(observed)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / 4000))


def test_zero_temperature_is_greedy() -> None:
    assert all(sample(LOGITS, temperature=0, seed=seed) == LOGITS.argmax() for seed in range(20))


@pytest.mark.parametrize("parameters", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}])
def test_narrowest_filters_are_greedy(parameters: dict[str, Any]) -> None:
    assert all(sample(LOGITS, seed=seed, **parameters) == LOGITS.argmax() for seed in range(20))


def test_top_k_keeps_ties() -> None:
    assert set(np.flatnonzero(frequencies(200, np.array([1.0, 3.0, 3.0, 3.0]), top_k=2))) == {
        1,
        2,
        3,
    }


def test_top_p_keeps_tokens_until_the_sum_is_reached() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    assert set(np.flatnonzero(frequencies(500, logits, top_p=0.5))) == {0}
    assert set(np.flatnonzero(frequencies(500, logits, top_p=0.51))) == {0, 1}


def test_draw_is_a_function_of_seed_and_position() -> None:
    tokens = [
        [sample(LOGITS, seed=seed, position=position) for position in range(30)]
        for seed in (0, 0, 1, 2**64 - 1, 2**64 - 2)
    ]
    assert tokens[0] == tokens[1]
    assert len({tuple(row) for row in tokens}) == 4
    assert len(set(tokens[0])) > 5, "positions of one seed draw differently"


def test_choices_of_a_seed_draw_differently() -> None:
    tokens = [
        [sample(LOGITS, seed=1, choice=choice, position=position) for position in range(300)]
        for choice in range(4)
    ]
    assert tokens[0] == [sample(LOGITS, seed=1, position=position) for position in range(300)], (
        "the first choice is that of a single text"
    )
    equal = sum(one == other for one, other in zip(tokens[0], tokens[1], strict=True)) / 300
    assert equal < 0.2, "choices are independent"
    assert len({tuple(row) for row in tokens}) == 4


@settings(max_examples=50, deadline=None)
@given(
    penalty=st.floats(0.1, 10),
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=20),
    tokens=st.lists(st.integers(0, 49), max_size=20),
)
def test_repetition_penalty_equals_transformers(
    penalty: float, prompt: list[int], tokens: list[int]
) -> None:
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + tokens]), torch.from_numpy(LOGITS)[None].double()
    )
    np.testing.assert_allclose(
        penalize(LOGITS, prompt, tokens, repetition=penalty), expected[0].numpy(), rtol=1e-6
    )


def test_presence_and_frequency_penalties_are_as_openai_defines_them() -> None:
    logits = np.array([2.0, 1.0, -1.0, 0.5], np.float32)
    penalized = penalize(logits, [3, 3], [0, 2, 0], presence=0.5, frequency=0.25)
    assert penalized.tolist() == [2 - 0.5 - 2 * 0.25, 1.0, -1 - 0.5 - 0.25, 0.5], (
        "the prompt's tokens do not count"
    )
    assert logits.tolist() == [2.0, 1.0, -1.0, 0.5]
    assert penalize(logits, [3], [0]) is logits
    for repetition in (0.0, -1.0, 5e-324, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="repetition is "):
            penalize(logits, [3], [0], repetition=repetition)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_equal_torch(count: int) -> None:
    expected = torch.from_numpy(LOGITS).double().log_softmax(-1)
    values, likeliest = expected.topk(count)
    token = int(expected.argmin())
    logprob, top = logprobs(LOGITS, token, count)
    assert list(top) == [*likeliest.tolist(), token]
    np.testing.assert_allclose(
        [*top.values(), logprob], [*values.tolist(), expected[token], expected[token]], rtol=1e-6
    )
    if count:
        best = int(likeliest[0])
        assert list(logprobs(LOGITS, best, count)[1]) == likeliest.tolist(), (
            "each token is listed once"
        )


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 30),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
)
def test_drawn_token_passes_the_filters(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    values = np.array(logits, np.float32)
    token = sample(values, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert 0 <= token < len(values)
    if top_k:
        assert (values > values[token]).sum() < top_k


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_parameter_out_of_range_is_named(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(parameters))} is "):
        sample(LOGITS, **parameters)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_or_infinite_logits_are_an_error(value: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[3] = value
    with pytest.raises(ValueError, match=f"the highest logit is {value}"):
        sample(logits, temperature=temperature)

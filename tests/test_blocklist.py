"""What is blocked is never shown: not a piece of it, not in pieces, and nothing else is held back in the end."""

import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from serve.blocklist import Blocklist, read
from serve.detokenize import TextStream
from serve.engine import Chunk, TokenLogprob
from serve.errors import Blocked
from serve.replicas import Text
from serve.schemas import CompletionRequest
from tests.support import bundles
from tests.test_engine import byte_tokenizer

PHRASES = st.lists(
    st.sampled_from(["a", "ab", "b a", "ba b", "a-b", "ABBA", "b", "a bb", "b ab"]),
    min_size=1,
    max_size=3,
    unique=True,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a bad word", "bad word"),
        ("BAD \n  Word!", "BAD \n  Word"),
        ("not bad, wordy", None),
        ("a bad words", None),
        ("embad word", None),
        ("STRASSE", "STRASSE"),
        ("what c++ is", "c++"),
        ("", None),
    ],
)
def test_phrases_are_found_as_whole_words_in_any_case(text: str, found: str | None) -> None:
    assert Blocklist(["bad word", "straße", "c++"]).find(text) == found


@settings(max_examples=400, deadline=None)
@given(
    st.text("abAB -\n", max_size=16),
    PHRASES,
    st.lists(st.text("ab- ", min_size=1, max_size=4), max_size=1),
    st.text("abA -", max_size=4),
)
def test_no_blocked_phrase_is_shown_and_nothing_else_is_lost(
    text: str, phrases: list[str], stops: list[str], prompt: str
) -> None:
    assume(Blocklist(phrases).find(prompt) is None)  # which would be refused
    stream, shown = TextStream(byte_tokenizer(), tuple(stops), Blocklist(phrases), prompt), ""
    spelled = [
        r"(?<!\w)" + r"\s+".join(map(re.escape, phrase.split())) + r"(?!\w)" for phrase in phrases
    ]
    for token in byte_tokenizer().encode(text).ids:
        shown += stream.push(token)
        assert len(shown) == stream.shown
        if stream.ended_by:
            break
    shown += stream.flush()
    end = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=len(text))
    # A phrase is a whole word in prompt and text, and lies before the stop string as a whole.
    everything, start = prompt + text, len(prompt)
    blocked = [
        max(found.start() - start, 0)
        for one in spelled
        for found in re.finditer(rf"(?=({one}))", everything, re.IGNORECASE)
        if start < found.end(1) <= start + end
    ]
    assert stream.ended_by == ("content_filter" if blocked else "stop" if end < len(text) else None)
    if blocked:
        assert min(blocked) <= len(shown)
        assert len(shown) in blocked, "what comes next is a blocked phrase"
        assert shown == text[: len(shown)]
    else:
        assert shown == text[:end]


def test_a_text_ends_before_what_is_blocked_and_a_prompt_with_it_is_refused(tmp_path: Path) -> None:
    folder = bundles.tiny_gpt_bundle(tmp_path / "gpt")

    async def ask(request: CompletionRequest, blocklist: list[str]) -> Chunk:
        replica = Text(slots=2, threads=1, timeout_s=60, blocklist=blocklist)
        await replica.reconfigure({"uri": str(folder)})
        answer = await replica.complete(request, "")
        if isinstance(answer, Exception):
            raise answer
        return answer[1][0]

    request = CompletionRequest(prompt="Now is", max_tokens=40, seed=3, temperature=1.0)
    whole = asyncio.run(ask(request, []))
    word = re.findall(r"(?<!\w)\w+(?!\w)", whole.text)[1]
    cut = asyncio.run(ask(request, [word.swapcase()]))
    found = re.search(rf"\b{word}\b", whole.text, re.IGNORECASE)
    assert found is not None
    assert (cut.text, cut.finish_reason) == (whole.text[: found.start()], "content_filter")
    assert cut.completion_tokens < whole.completion_tokens, "and its slot is free"
    with pytest.raises(Blocked, match="the prompt has words that are blocked here"):
        asyncio.run(ask(request, ["is"]))


def test_logprobs_tell_nothing_of_what_is_blocked(tmp_path: Path) -> None:
    folder = bundles.tiny_gpt_bundle(tmp_path / "gpt")

    async def ask(blocklist: list[str]) -> list[Chunk]:
        replica = Text(slots=1, threads=1, timeout_s=60, blocklist=blocklist)
        await replica.reconfigure({"uri": str(folder)})
        request = CompletionRequest(
            prompt="Now is", max_tokens=40, seed=3, temperature=1.0, logprobs=0, stream=True
        )
        return [
            answer[1]
            async for answer in replica.stream(request, "")
            if not isinstance(answer, Exception)
        ]

    whole = [one for chunk in asyncio.run(ask([])) for one in chunk.logprobs]
    text = "".join(one.token for one in whole)
    word = max(re.findall(r"(?<!\w)\w+(?!\w)", text)[1:], key=len)
    before, told = "", list[TokenLogprob]()
    for chunk in asyncio.run(ask([word])):
        before += chunk.text
        told += chunk.logprobs
        assert text.startswith(before)
        assert len("".join(one.token for one in told)) <= len(before), (
            "no token is told before its text is shown"
        )
    assert told == whole[: len(told)]
    assert word not in before
    assert told[-1].offset < len(before), "and all before it are"


def test_a_blocklist_is_a_file_with_a_phrase_a_line(tmp_path: Path) -> None:
    file = tmp_path / "blocked.txt"
    file.write_text(
        "# ours\n\n bad word \n  # and\nstraße\n", encoding="utf-8-sig"
    )  # as Windows' Notepad does
    assert read(file) == ["bad word", "straße"]
    file.write_text("# ours\n\n")
    with pytest.raises(ValueError, match=r"blocked\.txt holds no phrase"):
        read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"blocked\.txt cannot be read .* a phrase a line"):
        read(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path)

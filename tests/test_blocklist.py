"""Blocked phrases are never shown, not even in part, and all other text is shown in the end."""

import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from serve.errors import PromptBlocked
from serve.http.schemas import CompletionRequest
from serve.replicas import TextReplica
from serve.text.blocklist import Blocklist, read
from serve.text.chunks import Chunk, TokenLogprob
from serve.text.detokenize import TextStream
from tests.support import bundles
from tests.support.sessions import byte_tokenizer

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
def test_text_is_shown_up_to_the_first_blocked_phrase(
    text: str, phrases: list[str], stops: list[str], prompt: str
) -> None:
    assume(Blocklist(phrases).find(prompt) is None)  # such a prompt is refused
    stream, shown = TextStream(byte_tokenizer(), tuple(stops), Blocklist(phrases), prompt), ""
    patterns = [
        r"(?<!\w)" + r"\s+".join(map(re.escape, phrase.split())) + r"(?!\w)" for phrase in phrases
    ]
    for token in byte_tokenizer().encode(text).ids:
        shown += stream.push(token)
        assert len(shown) == stream.shown
        if stream.ended_by:
            break
    shown += stream.flush()
    end = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=len(text))
    # A match is a whole word in prompt and text, and lies completely before the stop string.
    everything, start = prompt + text, len(prompt)
    blocked = [
        max(found.start() - start, 0)
        for pattern in patterns
        for found in re.finditer(rf"(?=({pattern}))", everything, re.IGNORECASE)
        if start < found.end(1) <= start + end
    ]
    stopped = "stop" if end < len(text) else None
    assert stream.ended_by == ("content_filter" if blocked else stopped)
    if blocked:
        assert min(blocked) <= len(shown)
        assert len(shown) in blocked, "a blocked phrase comes next"
        assert shown == text[: len(shown)]
    else:
        assert shown == text[:end]


def test_text_ends_before_blocked_phrase_and_such_a_prompt_is_refused(tmp_path: Path) -> None:
    folder = bundles.tiny_gpt_bundle(tmp_path / "gpt")

    async def ask(request: CompletionRequest, blocklist: list[str]) -> Chunk:
        replica = TextReplica(slots=2, threads=1, timeout_s=60, blocklist=blocklist)
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
    assert cut.completion_tokens < whole.completion_tokens, "generation has stopped"
    with pytest.raises(PromptBlocked, match="the prompt contains words that are blocked here"):
        asyncio.run(ask(request, ["is"]))


def test_logprobs_do_not_reveal_blocked_text(tmp_path: Path) -> None:
    folder = bundles.tiny_gpt_bundle(tmp_path / "gpt")

    async def ask(blocklist: list[str]) -> list[Chunk]:
        replica = TextReplica(slots=1, threads=1, timeout_s=60, blocklist=blocklist)
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
    before, reported = "", list[TokenLogprob]()
    for chunk in asyncio.run(ask([word])):
        before += chunk.text
        reported += chunk.logprobs
        assert text.startswith(before)
        assert len("".join(one.token for one in reported)) <= len(before), (
            "no token is reported before its text is shown"
        )
    assert reported == whole[: len(reported)]
    assert word not in before
    assert reported[-1].offset < len(before), "all tokens before the phrase are reported"


def test_blocklist_file_has_one_phrase_per_line(tmp_path: Path) -> None:
    file = tmp_path / "blocked.txt"
    # With a byte order mark, as Notepad on Windows writes it.
    file.write_text("# ours\n\n bad word \n  # and\nstraße\n", encoding="utf-8-sig")
    assert read(file) == ["bad word", "straße"]
    file.write_text("# ours\n\n")
    with pytest.raises(ValueError, match=r"blocked\.txt contains no phrase"):
        read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"blocked\.txt cannot be read .* one phrase per line"):
        read(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path)

"""From tokens to text: whole characters, stop strings, the bytes of a token."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text.detokenize import TextStream, token_text
from tests.support.sessions import EOS, byte_tokenizer


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.lists(st.integers(0, 255), max_size=30),
        st.text(max_size=12).map(lambda text: byte_tokenizer().encode(text).ids),
    )
)
def test_pieces_join_to_decoded_text(ids: list[int]) -> None:
    stream = TextStream(byte_tokenizer())
    assert "".join(map(stream.push, ids)) + stream.flush() == byte_tokenizer().decode(ids)


def test_only_whole_characters_are_shown() -> None:
    stream = TextStream(byte_tokenizer())
    pieces = [stream.push(token) for token in byte_tokenizer().encode("é€😀").ids]
    assert [piece for piece in pieces if piece] == ["é", "€", "😀"]


def test_partial_character_is_written_as_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert [token_text(tokenizer, token) for token in tokenizer.encode("A €").ids] == [
        "A",
        " ",
        r"bytes:\xe2",
        r"bytes:\x82",
        r"bytes:\xac",
    ]
    assert token_text(tokenizer, EOS) == "<|endoftext|>"
    # Every non-ASCII byte that UTF-8 uses: these characters have two bytes each.
    encoded = "".join(map(chr, range(128, 0x800))).encode()
    texts = [token_text(tokenizer, token) for token in tokenizer.encode(encoded.decode()).ids]
    assert bytes(int(text.removeprefix(r"bytes:\x"), 16) for text in texts) == encoded


@settings(max_examples=200, deadline=None)
@given(st.text("ab-", max_size=20), st.lists(st.text("ab-", min_size=1, max_size=4), max_size=3))
def test_stop_string_is_not_shown(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(byte_tokenizer(), tuple(stops)), ""
    consumed = 0
    for token in byte_tokenizer().encode(text).ids:
        shown += stream.push(token)
        consumed += 1
        # Text that was shown never contains a stop string, whatever comes next.
        assert all(stop not in shown for stop in stops)
        if stream.ended_by:
            break
    shown += stream.flush()
    ends = [text[:consumed].find(stop) for stop in stops if stop in text[:consumed]]
    assert shown == text[: min(ends)] if ends else shown == text
    assert stream.ended_by == ("stop" if ends else None)

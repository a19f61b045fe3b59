"""The tokenizer of a text data set: trained on it, GPT-2's, or one from a file."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from train.config.data import TextData
from train.data.shipped.files import gpt2_tokenizer
from train.data.text_sources import Part, read_documents

END_OF_TEXT = "<|endoftext|>"
# More text does not change the merges of a small vocabulary noticeably.
TRAINING_CHARACTERS = 64_000_000


def build_tokenizer(data: TextData, parts: list[Part]) -> Tokenizer:
    """Load the tokenizer that data.tokenizer names; train it on the training documents for "bpe".

    Raises:
        ValueError: it cannot be loaded, or has no <|endoftext|>.
    """
    if data.tokenizer == "bpe":
        return _train_bpe(data, parts)
    if data.tokenizer == "gpt2":
        return Tokenizer.from_str(gpt2_tokenizer())
    file = tokenizer_file(data)
    if file is None:
        raise ValueError(
            f"data.tokenizer {data.tokenizer!r}: expected bpe, gpt2, or a folder or file with a "
            "tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ValueError(
            f"data.tokenizer: {file} is not a tokenizer.json of Hugging Face's tokenizers ({error})"
        ) from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise ValueError(
            f"data.tokenizer: {file} has no {END_OF_TEXT}, which separates documents: add it as a "
            "special token"
        )
    return tokenizer


def tokenizer_file(data: TextData) -> Path | None:
    """Return the tokenizer.json at data.tokenizer, or None where there is no such file."""
    path = Path(data.tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    return file if file.is_file() else None


def end_of_text(tokenizer: Tokenizer) -> int:
    """Return the id of the token that stands before each document."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    assert isinstance(token, int), token
    return token


def _train_bpe(data: TextData, parts: list[Part]) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019): it encodes any text, and decodes to the same
    text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(data, parts), trainer)
    return tokenizer


def _training_text(data: TextData, parts: list[Part]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for part in parts:
        for text, heldout in read_documents(part, data):
            if not heldout:
                yield text[:left]
                left -= len(text)
            if left <= 0:
                return

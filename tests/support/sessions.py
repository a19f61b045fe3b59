"""A session without a model for tests of the engine, and its tokenizer."""

import hashlib
import time

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS = 256
VOCAB = 257


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level BPE without merges: one token per byte, and the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def logits_after(history: list[int]) -> np.ndarray:
    """Return logits (VOCAB,) that depend on all previous tokens and their order."""
    digest = hashlib.sha256(np.array(history, np.int32).tobytes()).digest()
    return np.random.default_rng(list(digest)).standard_normal(VOCAB).astype(np.float32) * 3


class HashSession:
    """A session whose slots hold lists of tokens (`serve.text.engine.Session`).

    An engine that confuses slots, lengths or the order of steps gets other tokens.

    Args:
        step_s: the duration of a decode step.
    """

    def __init__(self, slots: int = 3, context: int = 96, step_s: float = 0.0) -> None:
        self.slots, self.context, self.eos_token_id, self.step_s = slots, context, EOS, step_s
        self.tokenizer = byte_tokenizer()
        self.copies = True
        self.cache: list[list[int]] = [[] for _ in range(slots)]
        self.largest_batch = self.released = 0
        self.prefill_sizes: list[int] = []

    def prefill(self, slot: int, ids: list[int], start: int = 0) -> np.ndarray:
        assert start <= len(self.cache[slot])
        self.cache[slot] = self.cache[slot][:start] + ids
        self.prefill_sizes.append(len(ids))
        return logits_after(self.cache[slot])

    def decode(self, slots: list[int], ids: list[int], lengths: list[int]) -> np.ndarray:
        assert len(set(slots)) == len(slots)
        time.sleep(self.step_s)
        self.largest_batch = max(self.largest_batch, len(slots))
        for slot, token, length in zip(slots, ids, lengths, strict=True):
            assert len(self.cache[slot]) == length
            self.cache[slot].append(token)
        return np.stack([logits_after(self.cache[slot]) for slot in slots])

    def copy(self, source: int, target: int, tokens: int) -> None:
        assert tokens <= len(self.cache[source])
        self.cache[target] = self.cache[source][:tokens]

    def clear(self, slot: int) -> None:
        self.cache[slot] = []

    def release(self) -> bool:
        self.cache = [[] for _ in range(self.slots)]
        self.released += 1
        return True

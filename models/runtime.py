"""Running the exported graphs on ONNX Runtime, without torch: what export checks is what serving runs.

A GPT graph runs over slots: rows of one key/value cache that stays where it is (the graph's `past_*` inputs and
`present_*` outputs are bound to the same memory, so that a step writes only its own new keys and values).
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}  # best first
# TensorFloat-32 keeps three digits: other tokens than the golden ones, and than the same request's on a CPU.
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
FIRST_TOKENS = 128  # what a slot has room for at first


def choose_providers(wanted: Sequence[str] | None = None) -> list[str]:
    """ONNX Runtime's execution providers, by its own names, best first; the last is always the CPU's, for operators that no other has.

    Args:
        wanted: some of `PROVIDERS`, best first; by default all that this build of ONNX Runtime has.

    Raises:
        ValueError: a provider that is unknown, or that this build does not have.
    """
    available = ort.get_available_providers()
    known = [name for name, provider in PROVIDERS.items() if provider in available]
    if wanted is None:
        return [PROVIDERS[name] for name in known]
    for name in wanted:
        if name not in PROVIDERS:
            raise ValueError(f"{name!r} is no execution provider: use {', '.join(PROVIDERS)}")
        if name not in known:
            raise ValueError(
                f"execution provider {name!r} is not in this build of ONNX Runtime, which has {', '.join(known)}: "
                "install onnxruntime-gpu in place of onnxruntime, or leave it out"
            )
    return [PROVIDERS[name] for name in (*(name for name in wanted if name != "cpu"), "cpu")]


def open_graph(
    path: str | os.PathLike[str], threads: int = 1, providers: Sequence[str] | None = None
) -> ort.InferenceSession:
    """An ONNX Runtime session.

    Args:
        threads: CPU threads of one operator.
        providers: execution providers out of `PROVIDERS`, best first: the graph runs on the first, or is refused. By default the
            best that works here: a build for CUDA also runs on machines without a GPU.

    Raises:
        ValueError: a provider that this build does not have or that does not start on this machine, or a file that is no graph.
    """
    chosen = choose_providers(providers)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised as well
    with_options = [(name, PROVIDER_OPTIONS.get(name, {})) for name in chosen]
    try:
        session = ort.InferenceSession(os.fspath(path), options, providers=with_options)
    except (
        errors.NoSuchFile,
        errors.InvalidProtobuf,
        errors.InvalidGraph,
        errors.InvalidArgument,
    ) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a readable ONNX graph: export the run again"
        ) from error
    if providers is not None and session.get_providers()[0] != chosen[0]:
        raise ValueError(
            f"execution provider {chosen[0]} does not start on this machine (no GPU, or no driver or library of its version): leave it out"
        )
    return session


class TextGraph:
    """A GPT's slot-cache graph (docs/reference/storage.md, "A bundle") and the cache of its slots.

    Args:
        path: the graph.
        context: the most tokens that a slot can hold.
        slots: sequences that can be under way at once; a full cache takes slots x 2 x layers x heads x context x head width floats.
        threads, providers: as for `open_graph`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        context: int,
        slots: int,
        threads: int = 1,
        providers: Sequence[str] | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}: at least one sequence must find room")
        self.session = open_graph(path, threads, providers)
        self.providers: list[str] = self.session.get_providers()
        self.context, self.slots = context, slots
        self.vocab_size: int = self.session.get_outputs()[0].shape[1]
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        names = [name.removeprefix("past_") for name in shapes if name.startswith("past_")]
        _, self._heads, _, self._head_dim = shapes[f"past_{names[0]}"]
        self._device = "cpu" if self.providers[0] == "CPUExecutionProvider" else "cuda"
        self.room = self._first_room = min(
            FIRST_TOKENS, context
        )  # tokens that fit into each slot: so far, and at first
        self._caches = {name: self._cache() for name in names}
        # Whether `copy` works: ONNX Runtime shows Python no part of a GPU's memory. Of the CPU's it does, which it promises nowhere.
        self.copies = self._device == "cpu" and all(
            cache.numpy().ctypes.data == cache.data_ptr() for cache in self._caches.values()
        )
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` in every slot, which keeps what it holds.

        Attention looks through all the room that there is, so the room doubles when it must instead of being the context from
        the start (4 layers, width 128, 8 rows: 0.4 ms of CPU a step with room for 128 tokens, 2.9 ms with room for 1024).
        """
        if tokens <= self.room:
            return
        self.room = min(max(2 * self.room, tokens), self.context)
        self._caches = {name: self._cache(cache.numpy()) for name, cache in self._caches.items()}
        self._bindings.clear()

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` positions of a slot's cache into another slot, where `copies`."""
        for cache in self._caches.values():
            values = cache.numpy()  # the memory itself
            values[target, :, :tokens] = values[source, :, :tokens]

    def clear(self, slot: int) -> None:
        """Zeros for what a slot holds: a NaN there would reach whoever takes it next, through positions that are masked."""
        for name, cache in self._caches.items():
            values = cache.numpy().copy()
            values[slot] = 0
            self._caches[name] = ort.OrtValue.ortvalue_from_numpy(values, self._device, 0)
        self._bindings.clear()

    def release(self) -> bool:
        """Gives back the room that one long text has made for all, with what the slots hold. False: there is no such room, all stays."""
        if self.room <= self._first_room:
            return False
        self.room = self._first_room
        self._caches = {name: self._cache() for name in self._caches}
        self._bindings.clear()
        return True

    def _cache(self, content: np.ndarray | None = None) -> ort.OrtValue:
        # One position more than tokens: the rows of a decode that have no token write there, where no token ever looks.
        # Zeros, not whatever was there: a masked position has weight 0, and 0 x NaN is NaN.
        values = np.zeros((self.slots, self._heads, self.room + 1, self._head_dim), np.float32)
        if content is not None:
            values[:, :, : content.shape[2]] = content
        return ort.OrtValue.ortvalue_from_numpy(values, self._device, 0)

    def run(
        self,
        first: int,
        ids: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        write: np.ndarray,
    ) -> np.ndarray:
        """One step of the B slots from `first` on, with the cache updated in place; there must be room (`reserve`).

        Args:
            ids: (B, S) int64 token ids; beyond a row's last real token, any.
            positions: (B, S) int64; a token sees the cache up to its own position.
            last: (B) int64, the index in `ids` of the row's last real token.
            write: (B) int64, the cache position of the row's first new token.

        Returns:
            (B, V) float32 logits after each row's last real token.
        """
        binding = self._binding(first, len(ids))
        for name, array in (
            ("ids", ids),
            ("positions", positions),
            ("last", last),
            ("write", write),
        ):
            binding.bind_cpu_input(name, np.ascontiguousarray(array, np.int64))
        logits = np.empty((len(ids), self.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        return logits

    def _binding(self, first: int, count: int) -> ort.IOBinding:
        """The caches of `count` slots from `first` on, bound in place; kept, since binding takes a third of a tiny model's step."""
        if (first, count) not in self._bindings:
            binding = self.session.io_binding()
            shape = (count, self._heads, self.room + 1, self._head_dim)
            offset = first * int(np.prod(shape[1:])) * 4
            for name, cache in self._caches.items():
                pointer = cache.data_ptr() + offset
                binding.bind_input(f"past_{name}", self._device, 0, np.float32, shape, pointer)
                binding.bind_output(f"present_{name}", self._device, 0, np.float32, shape, pointer)
            self._bindings[first, count] = binding
        return self._bindings[first, count]

    def prefill(self, slot: int, ids: Sequence[int], start: int = 0) -> np.ndarray:
        """Puts `ids` into a slot from position `start` on; what the slot held before `start` is its past.

        Returns:
            (V,) logits after the last id.

        Raises:
            ValueError: no ids, no such slot, or more tokens than the context holds.
        """
        if not ids:
            raise ValueError("a prompt needs at least one token")
        self._check(slot, start, len(ids))
        self.reserve(start + len(ids))
        positions = np.arange(start, start + len(ids))[None]
        return self.run(
            slot, np.asarray(ids)[None], positions, np.array([len(ids) - 1]), np.array([start])
        )[0]

    def decode(
        self, slots: Sequence[int], ids: Sequence[int], lengths: Sequence[int]
    ) -> np.ndarray:
        """One token further in each of `slots` (distinct, in any order); other slots keep what they hold.

        All rows between the lowest and the highest of `slots` are computed: keep to low slots where few are in use.

        Args:
            ids: the new token of each.
            lengths: the tokens that each slot holds already.

        Returns:
            (n, V) logits, row i for slots[i].

        Raises:
            ValueError: a slot is named twice or does not exist, or is full.
        """
        if len(set(slots)) != len(slots):
            raise ValueError(
                f"slots {list(slots)} name a slot twice: a step takes one token of each"
            )
        for slot, length in zip(slots, lengths, strict=True):
            self._check(slot, length, 1)
        self.reserve(max(lengths) + 1)
        first, rows = min(slots), np.asarray(slots) - min(slots)
        count = int(rows.max()) + 1
        tokens, positions = np.zeros((2, count, 1), np.int64)
        last, write = np.zeros(count, np.int64), np.full(count, self.room)
        tokens[rows, 0], positions[rows, 0], write[rows] = ids, lengths, lengths
        return self.run(first, tokens, positions, last, write)[rows]

    def greedy(self, ids: Sequence[int], max_tokens: int, eos_token_id: int) -> list[int]:
        """The likeliest continuation of `ids`, in slot 0: at most `max_tokens` ids, up to and without the end of text."""
        tokens: list[int] = []
        logits = self.prefill(0, ids)
        for length in range(len(ids), len(ids) + max_tokens):
            token = int(logits.argmax())
            if token == eos_token_id:
                break
            tokens.append(token)
            logits = self.decode([0], [token], [length])[0]
        return tokens

    def _check(self, slot: int, start: int, count: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} does not exist: there are slots 0 to {self.slots - 1}")
        if start < 0 or start + count > self.context:
            raise ValueError(
                f"{start} + {count} tokens do not fit into the context of {self.context}: shorten the prompt or ask for less"
            )


class ImageGraph:
    """A generator's graph: latents, and labels where it is conditional, to pictures.

    Args:
        path: the graph.
        threads: CPU threads of one operator.
        providers: as for `open_graph`.
    """

    def __init__(
        self, path: str | os.PathLike[str], threads: int = 1, providers: Sequence[str] | None = None
    ) -> None:
        self.session = open_graph(path, threads, providers)
        self.providers: list[str] = self.session.get_providers()

    def run(self, latents: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Pictures (B, C, H, W) float32 in [-1, 1] of latents (B, Z) and, of a conditional generator, labels (B)."""
        inputs = {"latents": np.ascontiguousarray(latents, np.float32)}
        if labels is not None:
            inputs["labels"] = np.ascontiguousarray(labels, np.int64)
        return self.session.run(["images"], inputs)[0]


def signature(session: ort.InferenceSession) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A graph's inputs and outputs as [{name, dtype, shape}]; a size of its own choice is a name."""

    def described(values: Sequence[ort.NodeArg]) -> list[dict[str, Any]]:
        dtypes = {"tensor(int64)": "int64", "tensor(float)": "float32"}
        return [
            {"name": value.name, "dtype": dtypes[value.type], "shape": value.shape}
            for value in values
        ]

    return described(session.get_inputs()), described(session.get_outputs())

"""Running the exported graphs on ONNX Runtime, without torch.

Export checks these classes against torch, and serving runs them.

A GPT graph runs over slots, the rows of one KV cache. The graph's `past_*` inputs and `present_*`
outputs are bound to the same memory, so that a step writes its new keys and values only.
"""

import os
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from models.bundle import TensorSpec

# Execution providers, the preferred ones first.
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
# TensorFloat-32 keeps three decimal digits, enough to change the tokens from those of a CPU.
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
INITIAL_CAPACITY = 128  # tokens of a slot's cache


def choose_providers(wanted: Sequence[str] | None = None) -> list[str]:
    """Return ONNX Runtime's names of execution providers, the preferred ones first.

    The last one is always the CPU's, which runs the operators that the others lack.

    Args:
        wanted: keys of `PROVIDERS`, the preferred ones first; default: all that this build of ONNX
            Runtime contains.

    Raises:
        ValueError: a provider is unknown, or this build does not contain it.
    """
    available = ort.get_available_providers()
    known = [name for name, provider in PROVIDERS.items() if provider in available]
    if wanted is None:
        return [PROVIDERS[name] for name in known]
    for name in wanted:
        if name not in PROVIDERS:
            raise ValueError(f"unknown execution provider {name!r}: use {', '.join(PROVIDERS)}")
        if name not in known:
            raise ValueError(
                f"execution provider {name!r} is not in this build of ONNX Runtime, which has "
                f"{', '.join(known)}: install onnxruntime-gpu in place of onnxruntime, or omit it"
            )
    return [PROVIDERS[name] for name in (*(name for name in wanted if name != "cpu"), "cpu")]


def open_graph(
    path: str | os.PathLike[str], threads: int = 1, providers: Sequence[str] | None = None
) -> ort.InferenceSession:
    """Open a graph in an ONNX Runtime session.

    Args:
        path: of the graph.
        threads: CPU threads of one operator.
        providers: keys of `PROVIDERS`, the preferred ones first; the first must start. Default: the
            best that starts on this machine (a build for CUDA also runs without a GPU).

    Raises:
        ValueError: the first provider is not in this build or does not start on this machine, or
            the file is not a graph.
    """
    chosen = choose_providers(providers)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: errors are raised as exceptions too
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
            f"execution provider {chosen[0]} does not start on this machine (no GPU, or no driver "
            "or library of its version): omit it"
        )
    return session


class TextGraph:
    """The graph of a GPT and the KV cache of its slots.

    Args:
        path: of the graph.
        context: the most tokens that a slot can hold.
        slots: the most sequences at a time. The cache at its full size has
            slots x 2 x layers x heads x context x head width floats.
        threads, providers: as for `open_graph`.

    Attributes:
        capacity: tokens that each slot can hold before the cache must grow.
        copies: whether `copy` works.
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
            raise ValueError(f"slots is {slots}: it must be at least 1")
        self.session = open_graph(path, threads, providers)
        self.providers: list[str] = self.session.get_providers()
        self.context, self.slots = context, slots
        self.vocab_size: int = self.session.get_outputs()[0].shape[1]
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        names = [name.removeprefix("past_") for name in shapes if name.startswith("past_")]
        _, self._heads, _, self._head_dim = shapes[f"past_{names[0]}"]
        self._device = "cpu" if self.providers[0] == "CPUExecutionProvider" else "cuda"
        self.capacity = self._initial_capacity = min(INITIAL_CAPACITY, context)
        self._caches = {name: self._cache() for name in names}
        # ONNX Runtime gives Python no access to GPU memory. To CPU memory it does, but this is
        # undocumented, hence the check.
        self.copies = self._device == "cpu" and all(
            cache.numpy().ctypes.data == cache.data_ptr() for cache in self._caches.values()
        )
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}

    def reserve(self, tokens: int) -> None:
        """Grow the cache until every slot can hold `tokens`; the slots keep their content.

        Attention reads the whole capacity, so the cache starts small and doubles when needed (4
        layers, width 128, 8 rows: 0.4 ms of CPU per step at a capacity of 128, 2.9 ms at 1024).
        """
        if tokens <= self.capacity:
            return
        self.capacity = min(max(2 * self.capacity, tokens), self.context)
        self._caches = {name: self._cache(cache.numpy()) for name, cache in self._caches.items()}
        self._bindings.clear()

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of a slot to another slot; requires `copies`."""
        for cache in self._caches.values():
            values = cache.numpy()  # not a copy
            values[target, :, :tokens] = values[source, :, :tokens]

    def clear(self, slot: int) -> None:
        """Fill a slot with zeros: a NaN in it would reach its next sequence (0 x NaN is NaN)."""
        for name, cache in self._caches.items():
            values = cache.numpy().copy()
            values[slot] = 0
            self._caches[name] = ort.OrtValue.ortvalue_from_numpy(values, self._device, 0)
        self._bindings.clear()

    def release(self) -> bool:
        """Shrink the cache to its initial capacity, dropping the content of all slots.

        Returns:
            False: the cache has not grown, and the slots keep their content.
        """
        if self.capacity <= self._initial_capacity:
            return False
        self.capacity = self._initial_capacity
        self._caches = {name: self._cache() for name in self._caches}
        self._bindings.clear()
        return True

    def _cache(self, content: np.ndarray | None = None) -> ort.OrtValue:
        # One position more than the capacity: rows of a decode without a token write there, and no
        # token attends to it. Zeros, since a masked position has weight 0, and 0 x NaN is NaN.
        values = np.zeros((self.slots, self._heads, self.capacity + 1, self._head_dim), np.float32)
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
        """Run one step of B consecutive slots; requires a sufficient capacity (`reserve`).

        Args:
            first: the first of the slots.
            ids: (B, S) int64 token ids; the values after a row's last real token do not matter.
            positions: (B, S) int64; a token attends to the cache up to its own position.
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
        """Return the binding of `count` slots from `first` on.

        Bindings are kept: making one takes a third of a tiny model's step.
        """
        if (first, count) not in self._bindings:
            binding = self.session.io_binding()
            shape = (count, self._heads, self.capacity + 1, self._head_dim)
            offset = first * int(np.prod(shape[1:])) * 4
            for name, cache in self._caches.items():
                pointer = cache.data_ptr() + offset
                binding.bind_input(f"past_{name}", self._device, 0, np.float32, shape, pointer)
                binding.bind_output(f"present_{name}", self._device, 0, np.float32, shape, pointer)
            self._bindings[first, count] = binding
        return self._bindings[first, count]

    def prefill(self, slot: int, ids: Sequence[int], start: int = 0) -> np.ndarray:
        """Write `ids` to a slot from position `start` on, attending to what it holds before.

        Returns:
            (V,) float32 logits after the last id.

        Raises:
            ValueError: `ids` is empty, the slot does not exist, or the tokens exceed the context.
        """
        if not ids:
            raise ValueError("a prompt needs at least one token")
        self._check(slot, start, len(ids))
        self.reserve(start + len(ids))
        positions = np.arange(start, start + len(ids))[None]
        last, write = np.array([len(ids) - 1]), np.array([start])
        logits: np.ndarray = self.run(slot, np.asarray(ids)[None], positions, last, write)[0]
        return logits

    def decode(
        self, slots: Sequence[int], ids: Sequence[int], lengths: Sequence[int]
    ) -> np.ndarray:
        """Append one token to each of `slots`; other slots keep their content.

        All rows between the lowest and the highest slot are computed, so use low slots first.

        Args:
            slots: n different slots, in any order.
            ids: the new token of each.
            lengths: the number of tokens that each slot holds.

        Returns:
            (n, V) float32 logits, row i for slots[i].

        Raises:
            ValueError: a slot is listed twice, does not exist or is full.
        """
        if len(set(slots)) != len(slots):
            raise ValueError(
                f"slots {list(slots)} list a slot twice: a step appends one token to each slot"
            )
        for slot, length in zip(slots, lengths, strict=True):
            self._check(slot, length, 1)
        self.reserve(max(lengths) + 1)
        first, rows = min(slots), np.asarray(slots) - min(slots)
        count = int(rows.max()) + 1
        tokens, positions = np.zeros((2, count, 1), np.int64)
        last, write = np.zeros(count, np.int64), np.full(count, self.capacity)
        tokens[rows, 0], positions[rows, 0], write[rows] = ids, lengths, lengths
        logits: np.ndarray = self.run(first, tokens, positions, last, write)[rows]
        return logits

    def greedy(self, ids: Sequence[int], max_tokens: int, eos_token_id: int) -> list[int]:
        """Generate up to `max_tokens` tokens after `ids` by greedy search, in slot 0.

        The end-of-text token ends the generation and is not returned.
        """
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
                f"{start} + {count} tokens do not fit into the context of {self.context}: shorten "
                "the prompt or ask for fewer tokens"
            )


class ImageGraph:
    """The graph of an image generator.

    Args:
        path: of the graph.
        threads: CPU threads of one operator.
        providers: as for `open_graph`.
    """

    def __init__(
        self, path: str | os.PathLike[str], threads: int = 1, providers: Sequence[str] | None = None
    ) -> None:
        self.session = open_graph(path, threads, providers)
        self.providers: list[str] = self.session.get_providers()

    def run(self, latents: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """Generate images.

        Args:
            latents: (B, Z).
            labels: (B) class indices, for a conditional generator only.

        Returns:
            (B, C, H, W) float32 in [-1, 1].
        """
        inputs = {"latents": np.ascontiguousarray(latents, np.float32)}
        if labels is not None:
            inputs["labels"] = np.ascontiguousarray(labels, np.int64)
        images: np.ndarray = self.session.run(["images"], inputs)[0]
        return images


def signature(session: ort.InferenceSession) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the inputs and the outputs of a graph."""
    dtypes = {"tensor(int64)": "int64", "tensor(float)": "float32"}

    def specs(values: Sequence[ort.NodeArg]) -> list[TensorSpec]:
        return [
            {"name": value.name, "dtype": dtypes[value.type], "shape": value.shape}
            for value in values
        ]

    return specs(session.get_inputs()), specs(session.get_outputs())

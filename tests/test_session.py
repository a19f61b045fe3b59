"""Text and image sessions over real (tiny) bundles, against transformers and torch."""

import asyncio
import contextlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM

from models import bundle
from models.latents import seeded_latents, truncated
from models.runtime import choose_providers
from serve.session import ImageSession, TextSession
from serve.text.chunks import Chunk
from serve.text.engine import Engine
from serve.text.sampling import Sampling
from tests.support.bundles import TEXT, tiny_gan_bundle, tiny_gpt_bundle

SLOTS = 6


@pytest.fixture(scope="module")
def gpt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_bundle(tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="module")
def gan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gan_bundle(tmp_path_factory.mktemp("gan"))


@pytest.fixture(scope="module")
def conditional_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gan_bundle(tmp_path_factory.mktemp("conditional"), num_classes=3)


@pytest.fixture(scope="module")
def session(gpt_folder: Path) -> TextSession:
    return TextSession(gpt_folder, slots=SLOTS)


@pytest.fixture(scope="module")
def rows(session: TextSession) -> list[list[int]]:
    """A different text of context length for each slot."""
    ids = session.tokenizer.encode(TEXT).ids
    return [ids[5 * slot : 5 * slot + session.context] for slot in range(SLOTS)]


@pytest.fixture(scope="module")
def expected(gpt_folder: Path, rows: list[list[int]]) -> np.ndarray:
    """The logits of transformers after every prefix of each row, (slots, context, V)."""
    model = AutoModelForCausalLM.from_pretrained(gpt_folder / "transformers")
    with torch.no_grad():
        return np.asarray(model(torch.tensor(rows)).logits)


def assert_close(answer: np.ndarray, reference: np.ndarray) -> None:
    np.testing.assert_allclose(answer, reference, atol=1e-5 * np.abs(reference).max())


# ---- text


def test_session_has_the_models_properties(session: TextSession) -> None:
    assert (session.slots, session.context, session.eos_token_id) == (SLOTS, 64, 0)
    assert session.providers == ["CPUExecutionProvider"]
    assert session.manifest["model"]["vocab_size"] == session.vocab_size == 320


def test_prefill_equals_transformers(
    session: TextSession, rows: list[list[int]], expected: np.ndarray
) -> None:
    for slot, length in zip(range(SLOTS), (1, 2, 7, 30, 63, 64), strict=True):
        assert_close(session.prefill(slot, rows[slot][:length]), expected[slot, length - 1])


def test_prefill_in_chunks_equals_transformers(
    session: TextSession, rows: list[list[int]], expected: np.ndarray
) -> None:
    start = 0
    for size in (1, 5, 30, 1, 27):
        answer = session.prefill(3, rows[0][start : start + size], start)
        start += size
        assert_close(answer, expected[0, start - 1])


def test_decode_equals_transformers_at_every_length(
    session: TextSession, rows: list[list[int]], expected: np.ndarray
) -> None:
    assert_close(session.prefill(0, rows[0][:1]), expected[0, 0])
    for length in range(1, session.context):
        assert_close(session.decode([0], [rows[0][length]], [length])[0], expected[0, length])


def test_row_is_bit_identical_in_any_batch(
    session: TextSession, rows: list[list[int]], expected: np.ndarray
) -> None:
    lengths = [9, 3, 40, 1, 25, 60]
    batches = [[2], [2, 0], [0, 1, 2], [5, 2], [1, 2, 3, 4], [4, 2, 5, 0, 3, 1]]
    answers = []
    for slots in batches:
        for slot in range(SLOTS):
            session.prefill(slot, rows[slot][: lengths[slot]])
        logits = session.decode(
            slots, [rows[slot][lengths[slot]] for slot in slots], [lengths[slot] for slot in slots]
        )
        for slot, answer in zip(slots, logits, strict=True):
            assert_close(answer, expected[slot, lengths[slot]])
        answers.append(logits[slots.index(2)])
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_int8_row_is_bit_identical_in_any_batch(
    tmp_path: Path, rows: list[list[int]], expected: np.ndarray
) -> None:
    """Dynamic quantization, with one scale for all rows of a batch, would fail this."""
    session = TextSession(tiny_gpt_bundle(tmp_path, weights="int8"), slots=SLOTS)
    alone = session.prefill(2, rows[2][:40])
    assert (
        0.05 * np.abs(expected).max()
        > np.abs(alone - expected[2, 39]).max()
        > 1e-5 * np.abs(expected).max()
    )
    session.prefill(2, rows[2][:16])
    np.testing.assert_array_equal(session.prefill(2, rows[2][16:40], start=16), alone)
    answers = []
    for slots in ([2], [2, 0], [5, 2], [4, 2, 5, 0, 3, 1]):
        for slot in slots:
            session.prefill(slot, rows[slot][: 40 + slot])
        logits = session.decode(
            slots, [rows[slot][40 + slot] for slot in slots], [40 + slot for slot in slots]
        )
        answers.append(logits[slots.index(2)])
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_slots_outside_a_step_keep_their_cache(
    session: TextSession, rows: list[list[int]], expected: np.ndarray
) -> None:
    session.prefill(1, rows[1][:63])  # one token of the context is left
    session.prefill(2, rows[2][:10])
    for slot in (0, 3):
        session.prefill(slot, rows[slot][:5])
    for length in range(5, 20):
        session.decode([3, 0], [rows[3][length], rows[0][length]], [length, length])
    assert_close(session.decode([1], [rows[1][63]], [63])[0], expected[1, 63])
    assert_close(session.prefill(2, rows[2][10:14], start=10), expected[2, 13])


def test_slot_ignores_its_previous_sequence(
    session: TextSession, rows: list[list[int]], expected: np.ndarray
) -> None:
    session.prefill(0, rows[5])
    assert_close(session.prefill(0, rows[0][:3]), expected[0, 2])
    assert_close(session.decode([0], [rows[0][3]], [3])[0], expected[0, 3])


def test_growing_cache_is_bit_identical(
    gpt_folder: Path, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.runtime.INITIAL_CAPACITY", 4)
    growing, plain = TextSession(gpt_folder, slots=2), TextSession(gpt_folder, slots=2)
    plain.reserve(plain.context)
    for length in range(3):
        for grown in (growing, plain):
            grown.prefill(1, rows[1][length : length + 1], length)
    np.testing.assert_array_equal(growing.prefill(0, rows[0][:3]), plain.prefill(0, rows[0][:3]))
    for length in range(3, plain.context):
        batch = [1, 0] if length < 10 else [0]
        step = batch, [rows[slot][length] for slot in batch], [length] * len(batch)
        np.testing.assert_array_equal(growing.decode(*step), plain.decode(*step))
    np.testing.assert_array_equal(
        growing.prefill(1, rows[1][10:20], 10), plain.prefill(1, rows[1][10:20], 10)
    )


def test_released_cache_is_bit_identical(
    gpt_folder: Path, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.runtime.INITIAL_CAPACITY", 4)
    session = TextSession(gpt_folder, slots=2)
    first = [session.prefill(1, rows[0][:3]), session.prefill(1, rows[0])]
    grown = session.capacity
    assert session.release()
    assert (session.capacity, grown) == (4, session.context)
    assert not session.release(), "there is nothing to release"
    for before, after in zip(
        first, [session.prefill(1, rows[0][:3]), session.prefill(1, rows[0])], strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_copied_slot_is_bit_identical(session: TextSession, rows: list[list[int]]) -> None:
    expected = [
        session.prefill(4, rows[0][:30]),
        session.prefill(4, rows[0][30:40], 30),
        session.decode([4], [rows[0][40]], [40])[0],
    ]
    session.prefill(4, rows[0][:30])
    session.prefill(1, rows[1])  # left over from another sequence
    untouched = session.prefill(5, rows[5][:20])
    session.copy(4, 1, 30)
    answers = [
        expected[0],
        session.prefill(1, rows[0][30:40], 30),
        session.decode([1], [rows[0][40]], [40])[0],
    ]
    np.testing.assert_array_equal(answers, expected)
    session.copy(5, 1, 10)
    np.testing.assert_array_equal(session.prefill(5, rows[5][:20]), untouched)


def test_slots_are_not_copied_if_python_sees_only_a_copy_of_their_memory(
    gpt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TextSession(gpt_folder, slots=2).copies
    numpy = ort.OrtValue.numpy
    monkeypatch.setattr(ort.OrtValue, "numpy", lambda value: numpy(value).copy())
    assert not TextSession(gpt_folder, slots=2).copies


def test_clear_removes_nan_from_one_slot_only(gpt_folder: Path, rows: list[list[int]]) -> None:
    session = TextSession(gpt_folder, slots=2)
    expected = session.prefill(1, rows[1][:20])
    following = session.decode([1], [rows[1][20]], [20])[0]
    session.prefill(1, rows[1][:20])
    for cache in session._caches.values():
        cache.numpy()[0] = np.nan
    assert np.isnan(session.prefill(0, rows[1][:20])).all(), (
        "masked positions have an effect: 0 x NaN is NaN"
    )
    session.clear(0)
    np.testing.assert_array_equal(session.prefill(0, rows[1][:20]), expected)
    np.testing.assert_array_equal(session.decode([1], [rows[1][20]], [20])[0], following)


def test_texts_and_logprobs_are_bit_identical_alone_and_in_batch(
    gpt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the engine, with the prefix cache and with a KV cache that grows."""
    monkeypatch.setattr("models.runtime.INITIAL_CAPACITY", 16)
    ends = ["", " glorious", " made glorious summer", "\n", " of"]
    requests = [
        (
            "Now is the winter of our discontent" + end,
            Sampling(max_tokens=12, temperature=temperature, seed=seed, logprobs=5),
        )
        for seed, end in enumerate(ends)
        for temperature in (0.0, 1.0)
    ]

    session, computed = TextSession(gpt_folder, slots=4), 0
    prefill = session.prefill

    def counted(slot: int, ids: list[int], start: int = 0) -> np.ndarray:
        nonlocal computed
        computed += len(ids)
        return prefill(slot, ids, start)

    monkeypatch.setattr(session, "prefill", counted)

    async def answers(requested: list[tuple[str, Sampling]]) -> list[list[Chunk]]:
        engine = Engine(session, chunk_size=8)
        found = await asyncio.gather(*(engine.submit(*request).results() for request in requested))
        engine.close()
        await asyncio.to_thread(engine.join)
        return found

    together = asyncio.run(answers(requests))
    shared, computed = computed, 0
    session.release()
    alone = [asyncio.run(answers([request]))[0] for request in requests]
    assert together == alone
    assert all(
        len(text.logprobs) == text.completion_tokens > 0 for texts in alone for text in texts
    )
    assert shared < computed


def test_two_threads_equal_transformers(
    gpt_folder: Path, rows: list[list[int]], expected: np.ndarray
) -> None:
    assert_close(TextSession(gpt_folder, slots=1, threads=2).prefill(0, rows[0]), expected[0, -1])


def test_invalid_slots_and_lengths_are_refused(session: TextSession) -> None:
    with pytest.raises(ValueError, match="60 \\+ 5 tokens do not fit into the context of 64"):
        session.prefill(0, [1] * 5, start=60)
    with pytest.raises(ValueError, match="do not fit"):
        session.decode([0], [1], [64])
    with pytest.raises(ValueError, match=f"slot {SLOTS} does not exist"):
        session.decode([SLOTS], [1], [0])
    with pytest.raises(ValueError, match="slot -1 does not exist"):
        session.prefill(-1, [1])
    with pytest.raises(ValueError, match="at least one token"):
        session.prefill(0, [])
    with pytest.raises(ValueError, match="list a slot twice"):
        session.decode([1, 1], [1, 1], [0, 0])


def test_golden_text_is_replayed(session: TextSession) -> None:
    session.replay_golden()
    assert "our discontent" in json.loads((session.folder / "golden.json").read_text())["text"]


@pytest.mark.parametrize("part", ["ids", "tokens", "text"])
def test_output_that_differs_from_golden_is_refused(tmp_path: Path, part: str) -> None:
    folder = tiny_gpt_bundle(tmp_path / "gpt")
    golden = json.loads((folder / "golden.json").read_text())
    golden[part] = (
        golden[part] + "!" if part == "text" else [*golden[part][:-1], golden[part][-1] ^ 1]
    )
    (folder / "golden.json").write_text(json.dumps(golden))
    bundle.write(folder, bundle.read(folder))
    with pytest.raises(ValueError, match=r"golden\.json recorded at its export"):
        TextSession(folder, slots=1).replay_golden()


@pytest.mark.parametrize("ends", [False, True])
def test_golden_token_may_lose_a_close_choice(
    tmp_path: Path, session: TextSession, ends: bool
) -> None:
    """Another processor may prefer another token.

    The last golden token, or the end of the text, is replaced by a less likely one. It passes if
    its logit is lower by at most two times the tolerance.
    """
    folder = tiny_gpt_bundle(tmp_path / "gpt")
    golden = json.loads((folder / "golden.json").read_text())
    if ends:
        golden["tokens"] = golden["tokens"][:5]
    *before, last = golden["tokens"]
    logits = session.prefill(0, [*golden["ids"], *before, *([last] if ends else [])])
    if ends:
        behind = logits.max() - logits[session.eos_token_id]
    else:
        second = int(np.argsort(logits)[-2])
        behind = logits.max() - logits[second]
        golden["tokens"] = [*before, second]
    golden["text"] = session.tokenizer.decode(golden["tokens"])
    (folder / "golden.json").write_text(json.dumps(golden))
    manifest = bundle.read(folder)
    for tolerance, fits in ((0.501 * behind, True), (0.499 * behind, False)):
        bundle.write(
            folder, manifest | {"parity": manifest["parity"] | {"tolerance": float(tolerance)}}
        )
        with (
            contextlib.nullcontext()
            if fits
            else pytest.raises(ValueError, match=r"gives other tokens than golden\.json")
        ):
            TextSession(folder, slots=1).replay_golden()


# ---- damaged or unsuitable bundles


@pytest.mark.parametrize(
    "file", ["model.onnx", "tokenizer.json", "golden.json", "transformers/model.safetensors"]
)
def test_flipped_byte_is_refused(tmp_path: Path, file: str) -> None:
    folder = tiny_gpt_bundle(tmp_path / "gpt")
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{file} does not have the sha256 that its manifest lists"
    ):
        TextSession(folder)


@pytest.mark.parametrize("content", [b"", b"no graph"])
def test_invalid_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = tiny_gpt_bundle(tmp_path / "gpt")
    (folder / "model.onnx").write_bytes(content)
    bundle.write(folder, bundle.read(folder))
    with pytest.raises(ValueError, match="is not a readable ONNX graph"):
        TextSession(folder)


def test_bundle_of_another_kind_is_refused(gpt_folder: Path, gan_folder: Path) -> None:
    with pytest.raises(ValueError, match="is a gan bundle where a gpt bundle is needed"):
        TextSession(gan_folder)
    with pytest.raises(ValueError, match="is a gpt bundle where a gan bundle is needed"):
        ImageSession(gpt_folder)


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("rocket", "unknown execution provider 'rocket': use tensorrt, cuda, cpu$"),
        (
            "cuda",
            "'cuda' is not in this build of ONNX Runtime, which has cpu: install onnxruntime-gpu",
        ),
    ],
)
def test_missing_provider_is_named(
    gan_folder: Path, monkeypatch: pytest.MonkeyPatch, provider: str, message: str
) -> None:
    monkeypatch.setattr(
        "onnxruntime.get_available_providers",
        lambda: ["AzureExecutionProvider", "CPUExecutionProvider"],
    )
    with pytest.raises(ValueError, match=message):
        ImageSession(gan_folder, providers=[provider, "cpu"])


def test_providers_are_ordered_best_first_with_cpu_last(monkeypatch: pytest.MonkeyPatch) -> None:
    has = [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "AzureExecutionProvider",
        "CPUExecutionProvider",
    ]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: has)
    tensorrt, cuda, _, cpu = has
    assert choose_providers() == [tensorrt, cuda, cpu]
    assert choose_providers(["cuda"]) == [cuda, cpu]
    assert choose_providers(["cpu"]) == [cpu]


def test_requested_gpu_that_does_not_start_is_refused(
    gan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, ONNX Runtime built for CUDA silently uses the CPU.

    So does this build if `get_available_providers` claims that it was built for CUDA.
    """
    monkeypatch.setattr(
        "onnxruntime.get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message="Specified provider 'CUDAExecutionProvider' is not in available provider names",
        )
        assert ImageSession(gan_folder).providers == ["CPUExecutionProvider"]
        with pytest.raises(
            ValueError, match="CUDAExecutionProvider does not start on this machine"
        ):
            ImageSession(gan_folder, providers=["cuda"])


# ---- images


def test_seeded_image_is_same_alone_and_in_batch(gan_folder: Path) -> None:
    session = ImageSession(gan_folder)
    five = session.generate_from_seed(7, 5)
    assert five.shape == (5, 28, 28, 1)
    assert five.dtype == np.uint8
    for count in range(1, 5):
        np.testing.assert_array_equal(session.generate_from_seed(7, count), five[:count])
    assert not np.array_equal(five[0], five[1])
    assert not np.array_equal(session.generate_from_seed(8, 1)[0], five[0])
    assert not np.array_equal(
        session.generate_from_seed(2**64 - 1, 1), session.generate_from_seed(2**64 - 2, 1)
    )


def test_images_are_bit_identical_in_any_session_and_batch(
    conditional_folder: Path,
) -> None:
    """The graph's floats, before they are rounded to gray levels, in two sessions."""
    one, other = ImageSession(conditional_folder), ImageSession(conditional_folder, threads=2)
    latents, labels = seeded_latents(7, 33, 16), np.arange(33) % 3
    alone = np.concatenate([one.run(latents[i : i + 1], labels[i : i + 1]) for i in range(33)])
    for batch in (2, 3, 8, 33):
        np.testing.assert_array_equal(other.run(latents[:batch], labels[:batch]), alone[:batch])


def test_truncated_image_is_same_alone_and_in_batch(
    conditional_folder: Path,
) -> None:
    session = ImageSession(conditional_folder)
    plain, typical = (
        session.generate_from_seed(7, 4),
        session.generate_from_seed(7, 4, truncation=0.5),
    )
    assert not np.array_equal(plain, typical)
    np.testing.assert_array_equal(session.generate_from_seed(7, 1, truncation=0.5), typical[:1])
    latents = truncated(seeded_latents(7, 4, 16), 0.5)
    np.testing.assert_array_equal(typical, session.generate(latents, session.labels(7, 4)))


def test_truncation_reduces_variety_within_a_class(conditional_folder: Path) -> None:
    session = ImageSession(conditional_folder)
    deviations = [
        session.generate_from_seed(0, 32, 1, truncation).std(axis=0).mean()
        for truncation in (None, 1.0, 0.3, 0.05)
    ]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[-1] < deviations[0] / 3


@pytest.mark.parametrize("truncation", [None, 0.7])
def test_interpolation_starts_and_ends_at_seeded_images(
    conditional_folder: Path, truncation: float | None
) -> None:
    session = ImageSession(conditional_folder)
    path = session.interpolate(7, 8, 9, truncation=truncation)
    for end, seed in ((path[0], 7), (path[-1], 8)):
        np.testing.assert_array_equal(
            end, session.generate_from_seed(seed, 1, 7 % 3, truncation)[0]
        )  # both in the class of the first
    np.testing.assert_array_equal(session.interpolate(8, 7, 9, 7 % 3, truncation)[0], path[-1])
    np.testing.assert_array_equal(session.interpolate(7, 8, 5, truncation=truncation), path[::2])
    strides = np.abs(np.diff(path.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert strides.max() < np.abs(path[0].astype(int) - path[-1]).mean() / 2, (
        "a jump instead of a walk"
    )


def test_interpolation_needs_no_classes_and_refuses_invalid_arguments(gan_folder: Path) -> None:
    session = ImageSession(gan_folder)
    np.testing.assert_array_equal(
        session.interpolate(1, 2, 2),
        [session.generate_from_seed(1, 1)[0], session.generate_from_seed(2, 1)[0]],
    )
    with pytest.raises(ValueError, match="steps is 1"):
        session.interpolate(1, 2, 1)
    with pytest.raises(ValueError, match="seed is -2"):
        session.interpolate(1, -2, 3)


def test_session_has_the_bundles_sample(gpt_folder: Path, gan_folder: Path, tmp_path: Path) -> None:
    assert ImageSession(gan_folder).sample == (gan_folder / "sample.png").read_bytes()
    assert TextSession(gpt_folder, slots=1).sample == (gpt_folder / "sample.txt").read_bytes()
    bare = tiny_gan_bundle(tmp_path / "gan")
    (bare / "sample.png").unlink()
    bundle.write(bare, bundle.read(bare))
    assert ImageSession(bare).sample is None


def test_images_span_all_gray_levels(gan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = ImageSession(gan_folder)
    values = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 1, 16, 16)
    monkeypatch.setattr(session, "run", lambda *_: values)
    assert session.generate(np.zeros((1, 16))).ravel().tolist() == list(range(256))


def test_class_is_the_label_or_follows_from_the_seed(conditional_folder: Path) -> None:
    session = ImageSession(conditional_folder)
    by_label = [session.generate_from_seed(7, 1, label)[0] for label in range(3)]
    assert not np.array_equal(by_label[0], by_label[1])
    mixed = session.generate_from_seed(7, 3)
    assert [int(np.argmin([np.abs(image.astype(int) - mixed[0]).sum() for image in by_label]))] == [
        7 % 3
    ]
    np.testing.assert_array_equal(session.generate_from_seed(7, 1), mixed[:1])
    with pytest.raises(ValueError, match="the model has the classes 0 to 2"):
        session.generate_from_seed(7, 1, 3)
    with pytest.raises(ValueError, match="labels must be given"):
        session.generate(np.zeros((1, 16)))


def test_unconditional_model_refuses_labels(gan_folder: Path) -> None:
    with pytest.raises(ValueError, match="labels must be left out"):
        ImageSession(gan_folder).generate_from_seed(7, 1, 0)


@pytest.mark.parametrize(
    ("seed", "count", "message"),
    [(-1, 1, "seed is -1"), (2**64, 1, "seed is"), (0, 0, "count is 0")],
)
def test_seed_or_count_out_of_range_is_named(
    gan_folder: Path, seed: int, count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSession(gan_folder).generate_from_seed(seed, count)


def test_golden_images_are_replayed(
    gan_folder: Path, conditional_folder: Path, tmp_path: Path
) -> None:
    for folder in (gan_folder, conditional_folder):
        ImageSession(folder).replay_golden()
    folder = tiny_gan_bundle(tmp_path / "gan")
    golden = json.loads((folder / "golden.json").read_text())
    golden["images"][0][0][14][14] += 0.01
    (folder / "golden.json").write_text(json.dumps(golden))
    bundle.write(folder, bundle.read(folder))
    with pytest.raises(
        ValueError, match=r"images that differ by 0\.01 from those golden\.json recorded"
    ):
        ImageSession(folder).replay_golden()


# ---- imports


def test_sessions_do_not_import_torch(gpt_folder: Path, gan_folder: Path) -> None:
    code = f"""
import sys
from serve.session import ImageSession, TextSession
TextSession({str(gpt_folder)!r}).replay_golden()
ImageSession({str(gan_folder)!r}).replay_golden()
assert not {{"torch", "transformers", "ray"}} & set(sys.modules), "imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""

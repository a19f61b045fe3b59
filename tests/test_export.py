"""Export: graphs equal transformers and torch, and a version records where it comes from."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import storage
from models import bundle, registry
from models.nets import gpt
from models.nets.dcgan import DcganConfig, Generator
from models.runtime import TextGraph
from serve.session import ImageSession, TextSession
from tests.support.bundles import (
    TEXT,
    tiny_gan_bundle,
    tiny_generator,
    tiny_gpt,
    tiny_gpt_bundle,
    tiny_tokenizer,
    trained_gpt,
)
from train import parity
from train.config import loader
from train.config.sections import Config
from train.data import text
from train.data.dataset import Dataset
from train.export import export
from train.gan import export as export_gan
from train.gpt import export as export_gpt
from train.gpt import quantize
from train.run.checkpoint import Checkpointer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def gpt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_bundle(tmp_path_factory.mktemp("gpt"))


# ---- GPT


def test_parity_covers_batches_and_caches(gpt_folder: Path) -> None:
    measured = bundle.read(gpt_folder)["parity"]
    names = [case["name"] for case in measured["cases"]]
    assert names == [
        *(f"batch {batch}, cache {cache}" for batch in (1, 2, 3) for cache in (0, 1, 7)),
        "ragged batch",
        "chunked prefill",
    ]
    assert (
        0
        < measured["max_abs_diff"]
        == max(case["max_abs_diff"] for case in measured["cases"])
        <= measured["tolerance"]
        < 1e-3
    )


def test_gpt_graph_has_the_documented_signature(gpt_folder: Path) -> None:
    manifest = bundle.read(gpt_folder)
    caches = [f"{part}_{layer}" for layer in range(2) for part in ("key", "value")]
    cache_shape = ["B", 2, "T", 16]
    assert manifest["inputs"] == [
        {"name": "ids", "dtype": "int64", "shape": ["B", "S"]},
        {"name": "positions", "dtype": "int64", "shape": ["B", "S"]},
        {"name": "last", "dtype": "int64", "shape": ["B"]},
        {"name": "write", "dtype": "int64", "shape": ["B"]},
        *({"name": f"past_{name}", "dtype": "float32", "shape": cache_shape} for name in caches),
    ]
    assert manifest["outputs"] == [
        {"name": "logits", "dtype": "float32", "shape": ["B", 320]},
        *({"name": f"present_{name}", "dtype": "float32", "shape": cache_shape} for name in caches),
    ]
    assert manifest["model"] == {
        "vocab_size": 320,
        "context": 64,
        "layers": 2,
        "heads": 2,
        "head_dim": 16,
        "eos_token_id": 0,
    }
    graph = onnx.load(gpt_folder / "model.onnx")
    assert (
        {operator.version for operator in graph.opset_import if operator.domain == ""}
        == {manifest["opset"]}
        == {24}
    )
    assert {node.domain for node in graph.graph.node} == {""}, "standard operators only"
    onnx.checker.check_model(graph)


def test_transformers_loads_the_same_model(gpt_folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(gpt_folder / "transformers")
    assert model.generation_config.use_cache, "generation with the folder uses a cache"
    tokenizer = AutoTokenizer.from_pretrained(gpt_folder / "transformers")
    ours = Tokenizer.from_file(str(gpt_folder / "tokenizer.json"))
    assert tokenizer(TEXT).input_ids == ours.encode(TEXT).ids
    assert tokenizer.decode(ours.encode(TEXT).ids) == TEXT
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    golden = json.loads((gpt_folder / "golden.json").read_text())
    prompt = tokenizer(golden["prompt"], return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=golden["max_tokens"], do_sample=False)[
        0, len(golden["ids"]) :
    ].tolist()
    assert tokens == golden["tokens"]
    assert tokenizer.decode(tokens) == golden["text"]


def test_bundle_has_a_sample_text(gpt_folder: Path) -> None:
    text = (gpt_folder / "sample.txt").read_text(encoding="utf-8")
    assert text.startswith("Now is the winter of")
    assert len(text) > 300


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny_tokenizer(path)
    return path


def test_smallest_context_is_exported_without_output_or_side_effects(
    tokenizer_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """The held-out text is shorter than the parity cases and has no word for a prompt."""
    model = tiny_gpt(context=8)
    ids = torch.arange(1, 9)[None]
    before = model(ids).logits
    made = export_gpt.export_gpt(model, tokenizer_file, np.array([0, 0]), tmp_path)
    assert made["model"]["context"] == 8
    golden = json.loads((tmp_path / "golden.json").read_text())
    assert len(golden["ids"]) + golden["max_tokens"] == 8
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert "".join(capfd.readouterr()) == ""
    assert [str(warning.message) for warning in recwarn] == []


def test_graph_that_attends_to_later_tokens_is_refused(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that is off by one matters only with chunks: nothing follows the newest token."""

    def peeking(*arguments: Any, slot_cache: export_gpt.SlotCache, **keywords: Any) -> Any:
        slot_cache.allowed = slot_cache.allowed.roll(1, dims=-1) | slot_cache.allowed
        return slot_attention(*arguments, slot_cache=slot_cache, **keywords)

    slot_attention = export_gpt.slot_attention
    monkeypatch.setattr(export_gpt, "slot_attention", peeking)
    with pytest.raises(ValueError, match="nothing is published"):
        export_gpt.export_gpt(tiny_gpt(), tokenizer_file, np.arange(1, 60), tmp_path)


def test_graph_with_other_greedy_tokens_is_refused(gpt_folder: Path) -> None:
    graph = TextGraph(gpt_folder / "model.onnx", context=64, slots=3)
    tokenizer = Tokenizer.from_file(str(gpt_folder / "tokenizer.json"))
    with pytest.raises(
        ValueError,
        match=r"the exported graph continues .* with the tokens .* and transformers with",
    ):
        export_gpt.golden_continuation(tiny_gpt(seed=1), graph, tokenizer, np.arange(1, 60), 0)


def test_difference_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        parity.check_parity({"fine": 0.0, "broken": float("nan"), "fine too": 0.0}, 1e-5, "logits")


# ---- 8-bit weights


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_bundle(tmp_path_factory.mktemp("int8"), weights="int8")


def test_int8_graph_has_8_bit_matrices_and_transformers_folder_float32(
    gpt_folder: Path, int8_folder: Path
) -> None:
    graph = onnx.load(int8_folder / "model.onnx").graph
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "MatMulNBits")]
    assert [node.op_type for node in products] == ["MatMulNBits"] * 9, (
        "four matrices per layer, and the head"
    )
    for node in products:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert {"bits": 8, "block_size": 32, "accuracy_level": 4}.items() <= attributes.items()
    exact, quantized = (
        load_file(folder / "transformers" / "model.safetensors")
        for folder in (gpt_folder, int8_folder)
    )
    assert exact.keys() == quantized.keys()
    assert all(torch.equal(exact[name], quantized[name]) for name in exact)
    assert all(tensor.dtype == torch.float32 for tensor in quantized.values())


def test_manifest_has_the_cost_of_int8(gpt_folder: Path, int8_folder: Path) -> None:
    exact, quantized = bundle.read(gpt_folder), bundle.read(int8_folder)
    assert exact["quantization"] is None
    assert (
        exact["parity"]["max_abs_diff"]
        < quantized["parity"]["max_abs_diff"]
        <= quantized["parity"]["tolerance"]
    )
    assert [case["name"] for case in quantized["parity"]["cases"]] == list(export_gpt.CASES)
    cost = quantized["quantization"]
    assert (cost["weights"], cost["block_size"]) == ("int8", 32)
    assert (
        0
        < abs(cost["bits_per_byte"] - cost["bits_per_byte_fp32"])
        < 0.01 * cost["bits_per_byte_fp32"]
    )
    assert bundle.describe_weights(quantized).startswith("int8 in blocks of 32: 0.")
    (golden, exact_golden) = (
        json.loads((folder / "golden.json").read_text()) for folder in (int8_folder, gpt_folder)
    )
    assert golden["tokens"] == exact_golden["tokens"], "the model knows the text by heart"


def test_bits_per_byte_equal_those_of_transformers(int8_folder: Path) -> None:
    """In windows of the context, the last one shorter, each token but a window's first is evaluated
    once, given the tokens before it in its window."""
    model, _, ids = trained_gpt()
    windows: list[list[int]] = [
        ids[start : start + 64].tolist() for start in range(0, len(ids), 64)
    ]
    assert len(windows) > 2
    assert len(windows[-1]) < 64
    with torch.no_grad():
        losses = [
            gpt.NextTokenLoss(model)(torch.tensor([window[:-1]]), torch.tensor([window[1:]]), "sum")
            for window in windows
        ]
    tokenizer = Tokenizer.from_file(str(int8_folder / "tokenizer.json"))
    num_bytes = sum(len(tokenizer.decode(window[1:]).encode()) for window in windows)
    cost = bundle.read(int8_folder)["quantization"]
    assert cost["evaluated_tokens"] == len(ids) - len(windows)
    assert cost["bits_per_byte_fp32"] == pytest.approx(
        float(sum(losses)) / np.log(2) / num_bytes, rel=1e-4
    )


def test_int8_that_costs_too_much_is_refused(gpt_folder: Path, tmp_path: Path) -> None:
    damaged = onnx.load(gpt_folder / "model.onnx")
    (head,) = (
        tensor for tensor in damaged.graph.initializer if tensor.name == "model.lm_head.weight"
    )
    head.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * np.float32(0.9), head.name)
    )
    onnx.save(damaged, tmp_path / "model.onnx")
    _, tokenizer_file, ids = trained_gpt()
    with pytest.raises(
        ValueError,
        match=r"takes .* bits per byte and with float32 .*: .* export with --weights fp32",
    ):
        quantize.measure(
            gpt_folder / "model.onnx",
            tmp_path / "model.onnx",
            64,
            ids,
            Tokenizer.from_file(str(tokenizer_file)),
        )


def test_logits_outside_the_tolerance_are_refused(int8_folder: Path) -> None:
    graph = TextGraph(int8_folder / "model.onnx", context=64, slots=3)
    with pytest.raises(
        ValueError,
        match=r"the exported graph's logits differ .* nothing is published; check the versions",
    ):
        export_gpt.measure_parity(trained_gpt()[0], graph, trained_gpt()[2], "fp32")
    with pytest.raises(
        ValueError,
        match=r"the exported graph's logits differ .* published; export with --weights fp32",
    ):
        export_gpt.measure_parity(tiny_gpt(seed=1), graph, trained_gpt()[2], "int8")


def test_quantized_graph_keeps_external_data_in_a_second_file(
    gpt_folder: Path, int8_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "fp32").mkdir()
    exact, quantized = tmp_path / "fp32" / "model.onnx", tmp_path / "model.onnx"
    onnx.save(
        onnx.load(gpt_folder / "model.onnx"),
        exact,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    quantize.quantize(exact, quantized)
    assert (tmp_path / "model.onnx.data").is_file()
    ids = trained_gpt()[2][:20].tolist()
    in_two, in_one = (
        TextGraph(path, 64, slots=1).prefill(0, ids)
        for path in (quantized, int8_folder / "model.onnx")
    )
    np.testing.assert_array_equal(in_two, in_one)


# ---- GAN


@pytest.mark.parametrize("num_classes", [0, 3])
def test_generator_graph_has_the_documented_signature(tmp_path: Path, num_classes: int) -> None:
    folder = tiny_gan_bundle(tmp_path, num_classes)
    manifest = bundle.read(folder)
    labels = [{"name": "labels", "dtype": "int64", "shape": ["B"]}] if num_classes else []
    assert manifest["inputs"] == [
        {"name": "latents", "dtype": "float32", "shape": ["B", 16]},
        *labels,
    ]
    assert manifest["outputs"] == [
        {"name": "images", "dtype": "float32", "shape": ["B", 1, 28, 28]}
    ]
    assert manifest["model"]["class_names"] == [f"class {label}" for label in range(num_classes)]
    assert [case["name"] for case in manifest["parity"]["cases"]] == [
        "batch 1",
        "batch 2",
        "batch 3",
        "batch 8",
    ]
    with Image.open(folder / "sample.png") as grid:
        assert min(grid.size) > 80


@pytest.mark.parametrize("num_classes", [0, 3])
def test_golden_images_are_those_of_the_weights(tmp_path: Path, num_classes: int) -> None:
    folder = tiny_gan_bundle(tmp_path, num_classes)
    generator = Generator(DcganConfig(**json.loads((folder / "generator.json").read_text()))).eval()
    generator.load_state_dict(load_file(folder / "generator.safetensors"))
    golden = json.loads((folder / "golden.json").read_text())
    streams = [np.random.Generator(np.random.Philox(key=[7, index])) for index in range(2)]
    latents = np.stack([stream.standard_normal(16, dtype=np.float32) for stream in streams])
    np.testing.assert_array_equal(np.array(golden["latents"], np.float32), latents)
    labels = torch.tensor(golden["labels"]) if num_classes else None
    with torch.no_grad():
        np.testing.assert_allclose(
            golden["images"], generator(torch.from_numpy(latents), labels), atol=2e-5
        )


def test_generator_graph_of_other_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        export_gan, "write_graph", lambda _, path: WRITE_GAN_GRAPH(tiny_generator(seed=1), path)
    )
    with pytest.raises(ValueError, match=r"images differ from torch's by .* \(batch .\)"):
        export_gan.export_gan(tiny_generator(), [], tmp_path)


WRITE_GAN_GRAPH = export_gan.write_graph


def test_every_class_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 3 classes and the data set names 2"):
        export_gan.export_gan(tiny_generator(num_classes=3), ["cat", "dog"], tmp_path)


# ---- from a run to a version


@pytest.fixture
def gpt_run(tmp_path: Path) -> str:
    """Return a storage with the run "shake" as training leaves it: data set, lineage, two
    checkpoints, summary."""
    root = str(tmp_path / "kiln")
    dataset = tmp_path / "kiln" / "data" / "plays-0123"
    dataset.mkdir(parents=True)
    tokenizer = tiny_tokenizer(dataset / "tokenizer.json")
    tokens = np.array(tokenizer.encode(TEXT).ids, np.uint16)
    tokens.tofile(dataset / "heldout.bin")
    shards = {
        "heldout": {
            "tokens": len(tokens),
            "shards": [{"file": "heldout.bin", "tokens": len(tokens)}],
        }
    }
    meta = {
        "kind": "text",
        "name": "plays",
        "fingerprint": "0123",
        "dtype": "uint16",
        "vocab_size": 320,
        "eos_token_id": 0,
    }
    storage.write_json(dataset / "dataset.json", meta | {"splits": shards})
    settings = loader.load(
        "gpt",
        None,
        {"model.width": 32, "model.layers": 2, "model.heads": 2, "model.context": 32, "steps": 20},
    )
    _leave_run(
        root,
        "shake",
        settings,
        {step: {"model": dict(tiny_gpt(step, context=32).named_parameters())} for step in (10, 20)},
    )
    return root


def _leave_run(root: str, run: str, settings: Config, states: dict[int, dict[str, Any]]) -> None:
    uri = storage.join(root, "runs", run)
    checkpoints = Checkpointer(uri, {"kind": settings.kind, **settings.model_dump()})
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.join()
    storage.write_json(
        storage.join(uri, "lineage.json"),
        {"dataset": {"name": "plays", "fingerprint": "0123", "uri": "moved"}, "commit": "abc"},
    )
    storage.write_json(
        storage.join(uri, "summary.json"),
        {"steps": max(states), "metrics": {"heldout_bits_per_byte": 2.5}},
    )


def test_version_records_run_data_set_commit_and_metrics(gpt_run: str) -> None:
    done = export("shake", gpt_run)
    assert (done.name, done.version, done.uri) == ("gpt", 1, f"{gpt_run}/models/gpt/1")
    assert registry.resolve(f"{gpt_run}/models", "gpt") == ("gpt", 1, done.uri)
    manifest = bundle.verify(done.uri)
    assert manifest == done.manifest
    assert manifest["run"] == {"name": "shake", "step": 20, "storage": gpt_run}
    assert (manifest["dataset"], manifest["commit"]) == (
        {"name": "plays", "fingerprint": "0123"},
        "abc",
    )
    assert manifest["metrics"] == {"heldout_bits_per_byte": 2.5}
    assert manifest["libraries"]["torch"].startswith("2.14")
    session = TextSession(done.uri, slots=1)
    session.replay_golden()
    ids = session.tokenizer.encode(TEXT).ids[:20]
    with torch.no_grad():
        expected = tiny_gpt(20, context=32)(torch.tensor([ids])).logits[0, -1]
    np.testing.assert_allclose(session.prefill(0, ids), expected, atol=1e-5)


def test_export_skips_an_incomplete_checkpoint(
    gpt_run: str, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(gpt_run) / "runs/shake/checkpoints/step_000020/manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        done = export("shake", gpt_run, "other")
    assert "step_000020" in caplog.text
    assert registry.names(f"{gpt_run}/models") == [done.name] == ["other"]
    assert done.manifest["run"]["step"] == 10
    assert done.manifest["metrics"] == {}, "the summary has the metrics of step 20"


def test_graph_of_other_weights_is_not_published(
    gpt_run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = export_gpt.write_graph

    def incorrect(model: Any, path: Path) -> None:
        bias = model.transformer.h[1].attn.c_attn.bias
        with torch.no_grad():
            bias += 1e-3
            correct(model, path)
            bias -= 1e-3

    monkeypatch.setattr(export_gpt, "write_graph", incorrect)
    with pytest.raises(
        ValueError,
        match=r"logits differ from torch's by .* \(.*\), and .* is allowed: nothing is published",
    ):
        export("shake", gpt_run)
    assert not storage.exists(f"{gpt_run}/models")


@pytest.mark.parametrize(
    ("run", "name", "damage", "message"),
    [
        ("shaek", None, None, r"run 'shaek' is not in .*, did you mean shake\?"),
        ("x", None, None, "run 'x' is not in .*; there are shake"),
        ("shake", "../gpt", None, r"model name '\.\./gpt' is not usable"),
        ("shake", None, "runs/shake/checkpoints", "no complete checkpoint"),
        ("shake", None, "runs/shake/lineage.json", "no lineage.json"),
        (
            "shake",
            None,
            "data/plays-0123",
            "data set of run 'shake' is no longer at .*/data/plays-0123",
        ),
    ],
)
def test_export_of_an_incomplete_run_is_an_error_and_publishes_nothing(
    gpt_run: str, run: str, name: str | None, damage: str | None, message: str
) -> None:
    if damage:
        storage.delete(storage.join(gpt_run, damage))
    with pytest.raises(ValueError, match=message):
        export(run, gpt_run, name)
    assert not storage.exists(f"{gpt_run}/models")


def test_unknown_weights_are_refused(gpt_run: str) -> None:
    with pytest.raises(ValueError, match="--weights int4 is unknown: use fp32 or int8"):
        export("shake", gpt_run, weights="int4")


def test_heldout_tokens_are_windows_spaced_evenly(
    gpt_run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = text.Tokens(Dataset.open(f"{gpt_run}/data/plays-0123"), "heldout", 32)
    whole = np.concatenate(tokens.shards)
    np.testing.assert_array_equal(export_gpt._heldout_tokens(tokens), whole[:-1])
    monkeypatch.setattr(export_gpt, "HELDOUT_TOKENS", len(whole) // 2)
    half = export_gpt._heldout_tokens(tokens)
    np.testing.assert_array_equal(
        half, np.concatenate([whole[:-1][start : start + 32] for start in range(0, len(whole), 64)])
    )


def test_damaged_checkpoint_is_not_exported(gpt_run: str) -> None:
    weights = Path(gpt_run) / "runs/shake/checkpoints/step_000020/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        export("shake", gpt_run)
    assert not storage.exists(f"{gpt_run}/models")


def test_export_uses_the_averaged_generator(tmp_path: Path) -> None:
    root = str(tmp_path)
    storage.write_json(
        tmp_path / "data" / "plays-0123" / "dataset.json",
        {"kind": "images", "classes": ["cat", "dog", "cow"]},
    )
    overrides = {
        "data.size": 28,
        "model.latent_dim": 16,
        "model.width": 4,
        "model.conditional": True,
    }
    average, last = (dict(tiny_generator(3, seed).state_dict()) for seed in (1, 2))
    _leave_run(
        root,
        "garments",
        loader.load("gan", None, overrides),
        {5: {"generator": last, "generator_ema": average}},
    )
    with pytest.raises(
        ValueError,
        match="--weights int8 is unsupported for run 'garments', which is a gan: use fp32",
    ):
        export("garments", root, weights="int8")
    done = export("garments", root)
    assert (done.name, done.version) == ("gan", 1)
    assert done.manifest["model"]["class_names"] == ["cat", "dog", "cow"]
    latents = np.zeros((1, 16), np.float32)
    with torch.no_grad():
        expected = tiny_generator(3, 1)(torch.from_numpy(latents), torch.tensor([2]))
    np.testing.assert_allclose(
        ImageSession(done.uri).run(latents, np.array([2])), expected, atol=1e-5
    )

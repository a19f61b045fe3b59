"""Export a GPT-2 of transformers as an ONNX graph over a slot cache, and compare it with
transformers.

The graph (docs/reference/storage.md, "A bundle") is transformers' model with another attention
function: new keys and values are scattered into caches that the caller owns, at each row's own
position, so that rows of any length share one step and a prompt may come in chunks. It uses
standard operators only, TensorScatter and Attention of opset 24. With 8-bit weights
(train/gpt/quantize.py) its matrix products become ONNX Runtime's MatMulNBits.
"""

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from cluster import storage
from models.bundle import ModelEntries, Parity, Quantization
from models.nets import gpt
from models.runtime import TextGraph, signature
from train.data import text
from train.data.dataset import Dataset
from train.gpt import quantize
from train.gpt.config import GptConfig
from train.gpt.model import build
from train.parallel.state import State
from train.parity import VERSIONS, check_parity

OPSET = 24
ATTENTION = "raykiln_slot_cache"
# Relative to the largest logit, so that it fits any model. float32 has 7 digits, of which sums over
# width and layers cost two. 8 bits have two digits: the logits of the demo differ by 1 %; whether
# that is acceptable is decided on held-out text (train/gpt/quantize.py).
RELATIVE_TOLERANCE = {"fp32": 1e-5, "int8": 0.05}
PROMPT_TOKENS, GOLDEN_TOKENS, SAMPLE_TOKENS = 8, 32, 300
# Enough to measure the cost of 8-bit weights to four digits: both graphs get the same tokens.
HELDOUT_TOKENS = 8192


class Golden(TypedDict):
    """The content of golden.json: a greedy continuation."""

    prompt: str
    ids: list[int]
    max_tokens: int
    tokens: list[int]
    text: str


# What parity is measured on: for each row of a batch, the sizes of the chunks that its tokens come
# in.
CASES: dict[str, list[list[int]]] = {
    **{
        f"batch {batch}, cache {cache}": [[cache, 1] if cache else [4]] * batch
        for batch in (1, 2, 3)
        for cache in (0, 1, 7)
    },
    "ragged batch": [[6, 2], [4, 1], [2, 3]],
    "chunked prefill": [[3, 4, 1]],
}


def export_checkpoint(
    config: GptConfig, state: State, dataset: Dataset, folder: Path, weights: str
) -> ModelEntries:
    """Write the bundle of a checkpoint: the averaged weights where the run has them.

    See `train.kinds.Kind.export`.
    """
    model = build(config, dataset)
    gpt.restore(model, state["model_ema" if "model_ema" in state else "model"])
    heldout = _heldout_tokens(text.Tokens(dataset, "heldout", model.config.n_positions))
    return export_gpt(model, dataset.fetch() / "tokenizer.json", heldout, folder, weights)


def _heldout_tokens(tokens: text.Tokens) -> np.ndarray:
    """Return about `HELDOUT_TOKENS` tokens: whole windows of the model's context, spaced evenly
    over the held-out text."""
    stride = max(tokens.num_windows * tokens.context // HELDOUT_TOKENS, 1)
    windows = tokens.every_window(0, stride)
    return np.concatenate([inputs[targets >= 0] for inputs, targets in windows])


def export_gpt(
    model: GPT2LMHeadModel,
    tokenizer_file: Path,
    heldout: np.ndarray,
    folder: Path,
    weights: str = "fp32",
) -> ModelEntries:
    """Write a GPT bundle's files, all but the manifest, into `folder`.

    Args:
        model: float32, on the CPU; it is put into eval mode, and its config is set to use a cache.
        tokenizer_file: Hugging Face `tokenizers` JSON.
        heldout: token ids (N) of text that the model was not trained on, in windows of the model's
            context. Parity, the golden continuation and the cost of 8-bit weights are measured on
            it.
        folder: exists and is empty.
        weights: of the graph, "fp32" or "int8"; those in the folder `transformers` are float32.

    Returns:
        The manifest's `kind`, `inputs`, `outputs`, `opset`, `parity`, `quantization` (None with
        float32) and `model`.

    Raises:
        ValueError: the graph's logits or greedy tokens differ from transformers', or 8-bit weights
            cost too much.
    """
    model.eval()
    config, eos = model.config, model.config.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(
            f"the model's config has eos_token_id {eos!r}: set it to the one token that ends a text"
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.save(str(folder / "tokenizer.json"))
    quantization = None
    if weights == "int8":
        quantization = _write_int8_graph(model, tokenizer, heldout, folder / "model.onnx")
    else:
        write_graph(model, folder / "model.onnx")
    graph = TextGraph(folder / "model.onnx", config.n_positions, slots=3)
    parity = measure_parity(model, graph, heldout, weights)
    golden = golden_continuation(model, graph, tokenizer, heldout, eos, weights)
    storage.write_json(folder / "golden.json", golden)
    sample = tokenizer.decode(gpt.sample(model, golden["ids"], SAMPLE_TOKENS))
    (folder / "sample.txt").write_text(golden["prompt"] + sample + "\n", encoding="utf-8")
    _save_for_transformers(
        model, tokenizer_file, tokenizer.id_to_token(eos), folder / "transformers"
    )
    inputs, outputs = signature(graph.session)
    sizes = {
        "vocab_size": config.vocab_size,
        "context": config.n_positions,
        "layers": config.n_layer,
        "heads": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "eos_token_id": eos,
    }
    return {
        "kind": "gpt",
        "inputs": inputs,
        "outputs": outputs,
        "opset": OPSET,
        "parity": parity,
        "quantization": quantization,
        "model": sizes,
    }


def _write_int8_graph(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, heldout: np.ndarray, path: Path
) -> Quantization:
    """Write the graph with 8-bit weights, made from a float32 graph whose parity was checked.

    Returns:
        The manifest's `quantization`.
    """
    context = model.config.n_positions
    with tempfile.TemporaryDirectory(prefix="raykiln-fp32-") as scratch:
        exact = Path(scratch) / "model.onnx"
        write_graph(model, exact)
        measure_parity(model, TextGraph(exact, context, slots=3), heldout)
        quantize.quantize(exact, path)
        return quantize.measure(exact, path, context, heldout, tokenizer)


# ---- the graph


@dataclass
class SlotCache:
    """What the attention layers of one traced call share."""

    past: tuple[Tensor, ...]  # keys and values of each layer in turn, each (B, H, T, D)
    write: Tensor  # (B): the position at which a row's new keys and values are written
    allowed: Tensor  # (B, 1, S, T), bool: which cached positions a new token attends to
    present: list[Tensor] = field(default_factory=list)  # as `past`, updated


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    slot_cache: SlotCache,
    **_: object,
) -> tuple[Tensor, None]:
    """Compute attention with ONNX operators, through transformers' attention interface.

    Args:
        query, key, value: (B, H, S, D).

    Returns:
        The output, (B, S, H, D), and None for the attention weights.
    """

    def scatter(past: Tensor, new: Tensor) -> Tensor:
        return _operator("TensorScatter", (past, new, slot_cache.write), {"axis": 2}, past)

    index = 2 * int(module.layer_idx)  # type: ignore[arg-type]  # an int of transformers
    keys = scatter(slot_cache.past[index], key)
    values = scatter(slot_cache.past[index + 1], value)
    slot_cache.present += [keys, values]
    output = _operator(
        "Attention", (query, keys, values, slot_cache.allowed), {"scale": float(scaling)}, query
    )
    return output.transpose(1, 2), None


def _operator(
    name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], like: Tensor
) -> Tensor:
    """Return the output of an ONNX operator, of the dtype and shape of `like`."""
    (output,) = torch.onnx.ops.symbolic_multi_out(
        name, inputs, attributes, dtypes=[like.dtype], shapes=[like.shape], version=OPSET
    )
    return output


class SlotCacheModel(nn.Module):
    """A GPT-2 whose KV caches are inputs and outputs; it returns the logits of each row's last
    token only."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, last: Tensor, write: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Run one step.

        Args:
            ids, positions: (B, S); a row with fewer tokens is padded.
            last: (B), the index of each row's last token that is no padding.
            write: (B), the position at which each row's new keys and values are written.
            past: keys and values of each layer in turn, each (B, H, T, D).

        Returns:
            The logits, (B, V), and the updated caches.
        """
        allowed = torch.arange(past[0].shape[2])[None, None, None, :] <= positions[:, None, :, None]
        cache = SlotCache(past, write, allowed)
        hidden = self.model.transformer(
            input_ids=ids, position_ids=positions, use_cache=False, slot_cache=cache
        ).last_hidden_state
        logits = self.model.lm_head(hidden[torch.arange(hidden.shape[0]), last])
        return logits, *cache.present


def write_graph(model: GPT2LMHeadModel, path: Path) -> None:
    """Export `model` over a slot cache to `path`; above 2 GB with model.onnx.data beside it."""
    config = model.config
    AttentionInterface.register(ATTENTION, slot_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    batch, tokens, cached = (torch.export.Dim(name) for name in "BST")
    row, cache = {0: batch}, {0: batch, 2: cached}
    # A tensor per input: torch.export would merge two inputs that are one tensor.
    ids, positions = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    last, write = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    caches = [
        torch.zeros(2, config.n_head, 5, config.n_embd // config.n_head)
        for _ in range(2 * config.n_layer)
    ]
    names = [f"{part}_{layer}" for layer in range(config.n_layer) for part in ("key", "value")]
    attention_before = config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        with warnings.catch_warnings():
            # Each input names the three sizes again on purpose: they are the same.
            warnings.filterwarnings(
                "ignore", message=r"# The axis name: [BST] will not be used", category=UserWarning
            )
            program = torch.onnx.export(
                SlotCacheModel(model).eval(),
                (ids, positions, last, write, *caches),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=[
                    "ids",
                    "positions",
                    "last",
                    "write",
                    *(f"past_{name}" for name in names),
                ],
                output_names=["logits", *(f"present_{name}" for name in names)],
                dynamic_shapes=(
                    {**row, 1: tokens},
                    {**row, 1: tokens},
                    row,
                    row,
                    (cache,) * len(caches),
                ),
            )
    finally:
        model.set_attn_implementation(attention_before)
    assert program is not None
    program.save(path)


# ---- parity and the golden continuation


def measure_parity(
    model: GPT2LMHeadModel, graph: TextGraph, heldout: np.ndarray, weights: str = "fp32"
) -> Parity:
    """Compare the graph's logits with those of transformers and its own cache, in all `CASES`.

    Returns:
        The manifest's `parity`.

    Raises:
        ValueError: the largest difference is above `RELATIVE_TOLERANCE[weights]` of the largest
            logit.
    """
    rows = np.resize(heldout, (3, 8)).tolist()
    graph.reserve(graph.context)
    differences, peak = {}, 1.0
    for name, chunks in CASES.items():
        expected = [
            _reference_logits(model, row, sizes) for row, sizes in zip(rows, chunks, strict=False)
        ]
        actual = _graph_logits(graph, rows, chunks)
        differences[name] = max(
            float(np.abs(one - other).max()) for one, other in zip(actual, expected, strict=True)
        )
        peak = max(peak, *(float(np.abs(logits).max()) for logits in expected))
    hint = VERSIONS if weights == "fp32" else "export with --weights fp32"
    return check_parity(differences, RELATIVE_TOLERANCE[weights] * peak, "logits", hint)


@torch.no_grad()
def _reference_logits(model: GPT2LMHeadModel, ids: list[int], sizes: list[int]) -> np.ndarray:
    """Return transformers' logits after each chunk of one row: (chunks, V)."""
    logits, cache, start = [], None, 0
    for size in sizes:
        output = model(
            input_ids=torch.tensor([ids[start : start + size]]),
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits[0, -1].numpy())
        cache, start = output.past_key_values, start + size
    return np.stack(logits)


def _graph_logits(
    graph: TextGraph, ids: list[list[int]], chunks: list[list[int]]
) -> list[np.ndarray]:
    """Return the graph's logits after each chunk, all rows in one batch: (chunks, V) per row."""
    sizes = np.array(chunks)  # (B, chunks)
    starts = np.cumsum(sizes, axis=1) - sizes
    logits = []
    for start, size in zip(starts.T, sizes.T, strict=True):
        width = np.arange(size.max())
        tokens = np.array(
            [
                np.resize(row[first : first + count], len(width))
                for row, first, count in zip(ids, start, size, strict=False)
            ]
        )
        positions = np.minimum(start[:, None] + width, graph.context - 1)
        logits.append(graph.run(0, tokens, positions, size - 1, start))
    return list(np.stack(logits, axis=1))


def golden_continuation(
    model: GPT2LMHeadModel,
    graph: TextGraph,
    tokenizer: Tokenizer,
    heldout: np.ndarray,
    eos: int,
    weights: str = "fp32",
) -> Golden:
    """Return the graph's greedy continuation of the first words of the held-out text.

    Raises:
        ValueError: transformers' greedy tokens differ. Compared with fp32 weights only: 8 bits may
            flip a close choice.
    """
    context = model.config.n_positions
    words = [int(token) for token in heldout[: 4 * PROMPT_TOKENS] if token != eos]
    # A truncated character decodes to U+FFFD, which encodes to other ids.
    prompt = tokenizer.decode(words[: min(PROMPT_TOKENS, context // 2)]).strip("\ufffd") or "\n"
    ids = tokenizer.encode(prompt).ids
    max_tokens = min(GOLDEN_TOKENS, context - len(ids))
    tokens = graph.greedy(ids, max_tokens, eos)
    if weights == "fp32":
        expected = _reference_tokens(model, ids, max_tokens, eos)
        if tokens != expected:
            raise ValueError(
                f"the exported graph continues {prompt!r} with the tokens {tokens} and "
                f"transformers with {expected}: nothing is published; {VERSIONS}"
            )
    return {
        "prompt": prompt,
        "ids": ids,
        "max_tokens": max_tokens,
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
    }


def _reference_tokens(
    model: GPT2LMHeadModel, ids: list[int], max_tokens: int, eos: int
) -> list[int]:
    """Return transformers' greedy continuation of `ids`, without the end-of-text token."""
    greedy = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
        use_cache=True,
    )
    prompt = torch.tensor([ids])
    output = model.generate(  # type: ignore[misc]  # its annotation does not fit its own models
        prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy
    )
    return [token for token in output[0, len(ids) :].tolist() if token != eos]


def _save_for_transformers(
    model: GPT2LMHeadModel, tokenizer_file: Path, eos_token: str | None, folder: Path
) -> None:
    """Save model and tokenizer as transformers' `from_pretrained` loads them."""
    # Training switches the cache off; those who load the folder generate with it.
    model.config.use_cache = model.generation_config.use_cache = True
    showed_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if showed_bars:
        transformers_logging.enable_progress_bar()
    # GPT2TokenizerFast would silently make an empty vocabulary of a tokenizer.json.
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), bos_token=eos_token, eos_token=eos_token
    ).save_pretrained(folder)

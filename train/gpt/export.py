"""A GPT-2 of transformers as an ONNX graph over a slot cache, checked against transformers itself.

The graph (docs/reference/storage.md, "A bundle") is transformers' own model with another attention function: new keys and values are
scattered into caches that the caller owns, at each row's own position, so that rows of any length share one step and a
prompt may come in chunks. Only standard operators: TensorScatter and Attention of opset 24. With 8-bit weights (train/gpt/quantize.py)
its products with matrices become ONNX Runtime's own MatMulNBits.
"""

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from models.nets import gpt
from models.runtime import TextGraph, signature
from train.gpt import quantize
from train.parity import VERSIONS, judge

WEIGHTS = ("fp32", "int8")
OPSET = 24
ATTENTION = "raykiln_slot_cache"
# Of the largest logit, so that it fits any model. float32 keeps 7 digits, of which sums over width and layers take two. 8 bits keep
# two: the demo's logits are 1 % off; how much text that costs is what decides (train/gpt/quantize.py).
RELATIVE_TOLERANCE = {"fp32": 1e-5, "int8": 0.05}
PROMPT_TOKENS, GOLDEN_TOKENS, SAMPLE_TOKENS = 8, 32, 300

# What parity is measured on: for each row of a batch, the sizes of the chunks in which its tokens come.
CASES: dict[str, list[list[int]]] = {
    **{
        f"batch {batch}, cache {cache}": [[cache, 1] if cache else [4]] * batch
        for batch in (1, 2, 3)
        for cache in (0, 1, 7)
    },
    "ragged batch": [[6, 2], [4, 1], [2, 3]],
    "chunked prefill": [[3, 4, 1]],
}


def export_gpt(
    model: GPT2LMHeadModel,
    tokenizer_file: Path,
    heldout: np.ndarray,
    folder: Path,
    weights: str = "fp32",
) -> dict[str, Any]:
    """Writes a GPT bundle's files (all but the manifest) into `folder`.

    Args:
        model: float32, on the CPU; it is put into eval mode, and its config to using a cache.
        tokenizer_file: Hugging Face `tokenizers` JSON.
        heldout: token ids (N) of text that the model was not trained on, in windows of the model's context: what parity, the golden
            answer and the cost of 8 bits are measured on.
        folder: exists and is empty.
        weights: of the graph, "fp32" or "int8"; the folder `transformers` has the model's own.

    Returns:
        The manifest's `kind`, `inputs`, `outputs`, `opset`, `parity`, `quantization` (None: float32) and `model`.

    Raises:
        ValueError: the graph's logits or greedy tokens are not transformers' own, or 8 bits cost too much text.
    """
    model.eval()
    config, eos = model.config, model.config.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(
            f"the model's config has eos_token_id {eos!r}: expected the one token that ends a text"
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
    golden = golden_answer(model, graph, tokenizer, heldout, eos, weights)
    storage.write_json(folder / "golden.json", golden)
    text = tokenizer.decode(gpt.sample(model, golden["ids"], SAMPLE_TOKENS))
    (folder / "sample.txt").write_text(golden["prompt"] + text + "\n", encoding="utf-8")
    _save_for_transformers(
        model, tokenizer_file, tokenizer.id_to_token(eos), folder / "transformers"
    )
    inputs, outputs = signature(graph.session)
    shape = {
        "vocab_size": config.vocab_size,
        "context": config.n_positions,
        "layers": config.n_layer,
        "heads": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "eos_token_id": eos,
    }
    measured = {"parity": parity, "quantization": quantization}
    return {
        "kind": "gpt",
        "inputs": inputs,
        "outputs": outputs,
        "opset": OPSET,
        **measured,
        "model": shape,
    }


def _write_int8_graph(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, heldout: np.ndarray, path: Path
) -> dict[str, Any]:
    """The graph at `path` with 8-bit weights, made from one in float32 that has passed its parity; returns the cost."""
    context = model.config.n_positions
    with tempfile.TemporaryDirectory(prefix="raykiln-fp32-") as scratch:
        exact = Path(scratch) / "model.onnx"
        write_graph(model, exact)
        measure_parity(model, TextGraph(exact, context, slots=3), heldout)
        quantize.quantize(exact, path)
        return quantize.measure(exact, path, context, heldout, tokenizer)


# ---------------------------------------------------------------- the graph


@dataclass
class SlotCache:
    """What the attention layers of one traced call share."""

    past: tuple[Tensor, ...]  # key, value of each layer: (B, H, T, D)
    write: Tensor  # (B)
    allowed: Tensor  # (B, 1, S, T)
    present: list[Tensor] = field(default_factory=list)


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    slot_cache: SlotCache,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface in ONNX operators: query, key, value (B, H, S, D) to (B, S, H, D)."""

    def scatter(past: Tensor, new: Tensor) -> Tensor:
        return _operator("TensorScatter", (past, new, slot_cache.write), {"axis": 2}, past)

    place = 2 * int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = scatter(slot_cache.past[place], key), scatter(slot_cache.past[place + 1], value)
    slot_cache.present += [keys, values]
    output = _operator(
        "Attention", (query, keys, values, slot_cache.allowed), {"scale": float(scaling)}, query
    )
    return output.transpose(1, 2), None


def _operator(
    name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], like: Tensor
) -> Tensor:
    (output,) = torch.onnx.ops.symbolic_multi_out(
        name, inputs, attributes, dtypes=[like.dtype], shapes=[like.shape], version=OPSET
    )
    return output


class SlotCacheModel(nn.Module):
    """A GPT-2 with its caches as inputs and outputs, and the logits of each row's last real token only."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, last: Tensor, write: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        allowed = torch.arange(past[0].shape[2])[None, None, None, :] <= positions[:, None, :, None]
        cache = SlotCache(past, write, allowed)
        hidden = self.model.transformer(
            input_ids=ids, position_ids=positions, use_cache=False, slot_cache=cache
        ).last_hidden_state
        logits = self.model.lm_head(hidden[torch.arange(hidden.shape[0]), last])
        return logits, *cache.present


def write_graph(model: GPT2LMHeadModel, path: Path) -> None:
    """Exports `model` over a slot cache; one file below 2 GB, with `model.onnx.data` beside it above."""
    config = model.config
    AttentionInterface.register(ATTENTION, slot_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    batch, tokens, cached = (torch.export.Dim(name) for name in "BST")
    row, cache = {0: batch}, {0: batch, 2: cached}
    # Each input a tensor of its own: torch.export takes one tensor given twice for one input.
    ids, positions = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    last, write = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    caches = [
        torch.zeros(2, config.n_head, 5, config.n_embd // config.n_head)
        for _ in range(2 * config.n_layer)
    ]
    names = [f"{part}_{layer}" for layer in range(config.n_layer) for part in ("key", "value")]
    usual = config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        with warnings.catch_warnings():
            # The three sizes are named once for each input on purpose: they are the same everywhere.
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
        model.set_attn_implementation(usual)
    assert program is not None
    program.save(path)


# ---------------------------------------------------------------- parity and the golden answer


def measure_parity(
    model: GPT2LMHeadModel, graph: TextGraph, heldout: np.ndarray, weights: str = "fp32"
) -> dict[str, Any]:
    """The largest difference between the graph's logits and transformers' with its own cache, over `CASES` of held-out text.

    Raises:
        ValueError: it is above `RELATIVE_TOLERANCE[weights]` of the largest logit.
    """
    rows = np.resize(heldout, (3, 8)).tolist()
    graph.reserve(graph.context)
    differences, peak = {}, 1.0
    for name, chunks in CASES.items():
        expected = [
            _reference_logits(model, row, sizes) for row, sizes in zip(rows, chunks, strict=False)
        ]
        answered = _graph_logits(graph, rows, chunks)
        differences[name] = max(
            float(np.abs(mine - theirs).max())
            for mine, theirs in zip(answered, expected, strict=True)
        )
        peak = max(peak, *(float(np.abs(logits).max()) for logits in expected))
    way_out = VERSIONS if weights == "fp32" else "export with --weights fp32"
    return judge(differences, RELATIVE_TOLERANCE[weights] * peak, "logits", way_out)


@torch.no_grad()
def _reference_logits(model: GPT2LMHeadModel, ids: list[int], sizes: list[int]) -> np.ndarray:
    """transformers' logits after each chunk of one row: (chunks, V)."""
    logits, cache, start = [], None, 0
    for size in sizes:
        answer = model(
            input_ids=torch.tensor([ids[start : start + size]]),
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(answer.logits[0, -1].numpy())
        cache, start = answer.past_key_values, start + size
    return np.stack(logits)


def _graph_logits(
    graph: TextGraph, ids: list[list[int]], chunks: list[list[int]]
) -> list[np.ndarray]:
    """The graph's logits after each chunk, rows side by side in one batch: (chunks, V) for each row."""
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


def golden_answer(
    model: GPT2LMHeadModel,
    graph: TextGraph,
    tokenizer: Tokenizer,
    heldout: np.ndarray,
    eos: int,
    weights: str = "fp32",
) -> dict[str, Any]:
    """What the graph answers greedily to the first words of the held-out text.

    Raises:
        ValueError: transformers' greedy tokens are others, in float32; 8 bits may turn a close choice.
    """
    context = model.config.n_positions
    words = [int(token) for token in heldout[: 4 * PROMPT_TOKENS] if token != eos]
    # A cut character decodes to U+FFFD, which encodes to other ids.
    prompt = tokenizer.decode(words[: min(PROMPT_TOKENS, context // 2)]).strip("\ufffd") or "\n"
    ids = tokenizer.encode(prompt).ids
    max_tokens = min(GOLDEN_TOKENS, context - len(ids))
    tokens = graph.greedy(ids, max_tokens, eos)
    if weights == "fp32":
        expected = _reference_tokens(model, ids, max_tokens, eos)
        if tokens != expected:
            raise ValueError(
                f"the exported graph continues {prompt!r} with the tokens {tokens} and transformers with {expected}: nothing is published"
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
    """transformers' greedy continuation of `ids`, up to and without the end of text."""
    plain = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
        use_cache=True,
    )
    prompt = torch.tensor([ids])
    answer = model.generate(  # type: ignore[misc]  # its own annotation does not fit its own models
        prompt, attention_mask=torch.ones_like(prompt), generation_config=plain
    )
    return [token for token in answer[0, len(ids) :].tolist() if token != eos]


def _save_for_transformers(
    model: GPT2LMHeadModel, tokenizer_file: Path, eos_token: str | None, folder: Path
) -> None:
    model.config.use_cache = model.generation_config.use_cache = (
        True  # training switches it off; whoever loads the folder wants to generate
    )
    showed_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if showed_bars:
        transformers_logging.enable_progress_bar()
    # Not GPT2TokenizerFast: of a tokenizer.json it silently makes an empty vocabulary.
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), bos_token=eos_token, eos_token=eos_token
    ).save_pretrained(folder)

"""8-bit weights for an exported GPT: its matrices take a quarter of the room. What that costs is measured on held-out text.

Every matrix is cut into blocks of 32 weights down a column, each with a scale of its own (ONNX Runtime's MatMulNBits). Activations are
rounded to 8 bits block by block too, within their own row: a row's logits do not depend on the other rows of its batch, as they
do under dynamic quantisation with one scale a tensor. Embeddings, norms and biases stay in float32.
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from models.runtime import TextGraph

BLOCK_SIZE = 32
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level
SLOTS = 8  # windows judged side by side
MAX_LOSS = 0.01  # more bits a byte than in float32, as a share


def quantize(source: Path, target: Path) -> None:
    """Writes the graph at `source` to `target` with 8-bit matrices."""
    # The module configures the root logger when it is imported; a root logger that has a handler it leaves alone.
    keep_out = logging.NullHandler()
    logging.getLogger().addHandler(keep_out)
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    finally:
        logging.getLogger().removeHandler(keep_out)
    matmul_nbits_quantizer.logger.setLevel(logging.WARNING)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        str(source),
        bits=8,
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        accuracy_level=INT8_ACTIVATIONS,
    )
    quantizer.model.replace_gemm_with_matmul()  # the quantizer passes Gemm over
    quantizer.process()
    in_two_files = source.with_name(f"{source.name}.data").exists()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=in_two_files)


def measure(
    reference: Path, quantized: Path, context: int, heldout: np.ndarray, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What 8 bits cost: a manifest's `quantization`.

    Args:
        reference, quantized: the graphs, both run as serving runs them.
        heldout: token ids (N) of text that the model was not trained on, judged in windows of `context`.

    Raises:
        ValueError: the text costs more than `MAX_LOSS` more bits, or no number of them.
    """
    tokens = heldout.tolist()
    windows = [tokens[start : start + context] for start in range(0, len(tokens), context)]
    before, after = (
        bits_per_byte(TextGraph(path, context, SLOTS), windows, tokenizer)
        for path in (reference, quantized)
    )
    if not after <= before * (1 + MAX_LOSS):
        raise ValueError(
            f"with 8-bit weights the held-out text takes {after:.4g} bits a byte where it took {before:.4g} with float32: more than {MAX_LOSS:.0%} "
            "is lost and nothing is published; export with --weights fp32"
        )
    judged = sum(len(window) - 1 for window in windows)
    return {
        "weights": "int8",
        "block_size": BLOCK_SIZE,
        "evaluated_tokens": judged,
        "bits_per_byte": after,
        "bits_per_byte_fp32": before,
    }


def bits_per_byte(graph: TextGraph, windows: list[list[int]], tokenizer: Tokenizer) -> float:
    """The cross-entropy of each window's tokens after its first, in bits a byte of UTF-8 text; none where there are none."""
    nats = sum(
        _nats(graph, windows[first : first + graph.slots])
        for first in range(0, len(windows), graph.slots)
    )
    num_bytes = sum(
        len(tokenizer.decode(window[1:], skip_special_tokens=False).encode()) for window in windows
    )
    return nats / math.log(2) / max(num_bytes, 1)


def _nats(graph: TextGraph, windows: list[list[int]]) -> float:
    """The windows side by side, a slot each, token by token."""
    nats = 0.0
    for length in range(max(map(len, windows)) - 1):
        slots = [slot for slot, window in enumerate(windows) if len(window) > length + 1]
        logits = graph.decode(
            slots, [windows[slot][length] for slot in slots], [length] * len(slots)
        ).astype(np.float64)
        peak = logits.max(axis=1)
        targets = logits[np.arange(len(slots)), [windows[slot][length + 1] for slot in slots]]
        nats += float((np.log(np.exp(logits - peak[:, None]).sum(axis=1)) + peak - targets).sum())
    return nats

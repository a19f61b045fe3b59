"""8-bit weights for an exported GPT, at a quarter of the size; the cost is measured on held-out
text.

Every matrix is divided into blocks of 32 weights along a column, each with its own scale (ONNX
Runtime's MatMulNBits). Activations are rounded to 8 bits in blocks too, within their row: a row's
logits do not depend on the other rows of its batch, as they do under dynamic quantization with one
scale per tensor. Embeddings, norms and biases stay in float32.
"""

import logging
import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from models.bundle import Quantization
from models.runtime import TextGraph

BLOCK_SIZE = 32
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level
SLOTS = 8  # windows evaluated side by side
MAX_LOSS = 0.01  # how many more bits per byte than in float32, as a fraction


def quantize(source: Path, target: Path) -> None:
    """Write the graph at `source` to `target` with 8-bit matrices."""
    # On import the module configures the root logger, unless that has a handler.
    placeholder = logging.NullHandler()
    logging.getLogger().addHandler(placeholder)
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    finally:
        logging.getLogger().removeHandler(placeholder)
    matmul_nbits_quantizer.logger.setLevel(logging.WARNING)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        str(source),
        bits=8,
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        accuracy_level=INT8_ACTIVATIONS,
    )
    quantizer.model.replace_gemm_with_matmul()  # the quantizer ignores Gemm
    quantizer.process()
    in_two_files = source.with_name(f"{source.name}.data").exists()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=in_two_files)


def measure(
    reference: Path, quantized: Path, context: int, heldout: np.ndarray, tokenizer: Tokenizer
) -> Quantization:
    """Measure what 8-bit weights cost.

    Args:
        reference: the float32 graph; both graphs are run as serving runs them.
        quantized: the graph with 8-bit weights.
        context: tokens per window.
        heldout: token ids (N) of text that the model was not trained on.
        tokenizer: the model's.

    Returns:
        The manifest's `quantization`.

    Raises:
        ValueError: bits per byte grow by more than `MAX_LOSS`, or are not finite.
    """
    tokens = heldout.tolist()
    windows = [tokens[start : start + context] for start in range(0, len(tokens), context)]
    before, after = (
        bits_per_byte(TextGraph(path, context, SLOTS), windows, tokenizer)
        for path in (reference, quantized)
    )
    if not after <= before * (1 + MAX_LOSS):
        raise ValueError(
            f"with 8-bit weights the held-out text takes {after:.4g} bits per byte and with "
            f"float32 {before:.4g}, and {MAX_LOSS:.0%} more is allowed: nothing is published; "
            "export with --weights fp32"
        )
    return {
        "weights": "int8",
        "block_size": BLOCK_SIZE,
        "evaluated_tokens": sum(len(window) - 1 for window in windows),
        "bits_per_byte": after,
        "bits_per_byte_fp32": before,
    }


def bits_per_byte(graph: TextGraph, windows: list[list[int]], tokenizer: Tokenizer) -> float:
    """Return the cross-entropy of each window's tokens after its first one, in bits per byte of
    UTF-8 text; 0 where there are no such tokens."""
    nats = sum(
        _nats(graph, windows[first : first + graph.slots])
        for first in range(0, len(windows), graph.slots)
    )
    num_bytes = sum(
        len(tokenizer.decode(window[1:], skip_special_tokens=False).encode()) for window in windows
    )
    return nats / math.log(2) / max(num_bytes, 1)


def _nats(graph: TextGraph, windows: list[list[int]]) -> float:
    """Return the sum of the cross-entropy over windows, which run side by side, a slot each."""
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

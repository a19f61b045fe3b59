"""The two parts of model FLOP utilization (MFU): operations per training step, and the device's
peak."""

import re
import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense TFLOP/s with accumulation in fp32, not the doubled sparse numbers of data sheets. The
# patterns match the end of torch.cuda.get_device_name: a laptop's 4090, a MIG slice and a GH200 are
# other devices, and unknown here. From NVIDIA's data sheets: A100 (2022), H100 (2022, NVL 2024),
# H200 (2024), L4, L40S (2023), A10G (AWS and NVIDIA, 2022), T4 (2019), V100 (2020); RTX 4090: the
# Ada architecture's white paper, table 2. A missing precision has no tensor-core support.
CUDA_TFLOPS: dict[str, dict[str, float]] = {
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    # the SXM module
    r"H100 80GB HBM3": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    r"H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51.2},
    r"H100 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},
    r"H200": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    r"H200 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},
    r"L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    r"L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    r"A10G": {"bf16": 70, "fp16": 70, "tf32": 35, "fp32": 35},
    r"T4": {"fp16": 65, "fp32": 8.1},
    r"V100-SXM2-\d+GB(-LS)?": {"fp16": 125, "fp32": 15.7},
    r"V100-PCIE-\d+GB": {"fp16": 112, "fp32": 14},
    r"RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
}


def gpt_flops(parameters: int, layers: int, width: int, context: int) -> int:
    """Return the floating-point operations of training, forward and backward, per token:
    6 N + 12 L D T.

    A multiplication and an addition per parameter in the forward pass and twice that in the
    backward pass, and attention's two products with T keys in each layer (PaLM, arXiv 2204.02311,
    appendix B; nanoGPT's `estimate_mfu`). Recomputed activations, and the half of attention that a
    causal kernel may skip, are not counted: MFU is about the model's operations, not the device's.

    Args:
        parameters: N, those of matrices that every token is multiplied with: not of positions, and
            of a token embedding only where it is the output layer too, as in GPT-2.
        layers: L, the blocks.
        width: D, of the residual stream (heads times head width).
        context: T, tokens per sample.
    """
    return 6 * parameters + 12 * layers * width * context


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the device's peak in matrix products, floating-point operations per second; 0:
    unknown.

    Args:
        device: a CPU is measured, in about 0.2 s and with torch's number of threads; a GPU is
            looked up by its name.
        precision: "fp32", "bf16" or "fp16". fp32 on CUDA counts as TF32 where torch is set to use
            it.
    """
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return _listed(torch.cuda.get_device_name(device), precision, tf32)
    return _measured(DTYPES[precision]) if device.type == "cpu" else 0.0


def _listed(name: str, precision: str, tf32: bool) -> float:
    """Return a GPU's peak from `CUDA_TFLOPS`; 0: unknown."""
    for pattern, tflops in CUDA_TFLOPS.items():
        if re.fullmatch(rf"((NVIDIA|Tesla|GeForce) )*({pattern})", name):
            units = "tf32" if precision == "fp32" and tf32 and "tf32" in tflops else precision
            return tflops.get(units, 0.0) * 1e12
    return 0.0


def _measured(dtype: torch.dtype, size: int = 512, seconds: float = 0.2) -> float:
    """Return this CPU's best speed of a product of two (size, size) matrices."""
    # Not random numbers: training's generator must not change.
    square = torch.ones(size, size, dtype=dtype)
    begin, best = time.perf_counter(), float("inf")
    while best == float("inf") or time.perf_counter() - begin < seconds:
        before = time.perf_counter()
        square @ square
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best

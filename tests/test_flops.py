"""The operations of a training step, and the peak of a device."""

import pytest
import torch
import torch.nn.functional as F

from models.nets import gpt
from train.run import flops


def test_gpt_flops_equals_a_count_by_hand() -> None:
    # 6 x 1,000 = 6,000, and 12 x 2 layers x 8 wide x 16 tokens = 3,072
    assert flops.gpt_flops(parameters=1000, layers=2, width=8, context=16) == 9072


def test_gpt_flops_equals_torch_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = gpt.build(vocab_size=96, context=32, width=48, layers=3, heads=4)
    # The counter knows only matrix products on a CPU.
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 96, (2, 33))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    matrices -= 32 * 48  # position embeddings are added, not multiplied
    assert flops.gpt_flops(matrices, 3, 48, 32) * 64 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312),
        ("NVIDIA A100 80GB PCIe", "fp32", True, 156),
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 PCIe", "fp16", False, 756),
        ("NVIDIA H200", "fp32", False, 66.9),
        ("NVIDIA L4", "bf16", False, 121),
        ("NVIDIA L40S", "bf16", False, 362),
        ("NVIDIA A10G", "bf16", False, 70),
        ("Tesla T4", "fp16", False, 65),
        ("Tesla T4", "fp32", True, 8.1),  # it has no TF32
        ("Tesla T4", "bf16", False, 0),  # and no bf16 units
        ("Tesla V100-SXM2-16GB", "fp16", False, 125),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, 0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", False, 0),
        ("NVIDIA GH200 480GB", "bf16", False, 0),
        ("NVIDIA L40", "bf16", False, 0),
    ],
)
def test_gpu_is_looked_up_by_its_full_name(
    name: str, precision: str, tf32: bool, tflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(
        torch, "get_float32_matmul_precision", lambda: "high" if tf32 else "highest"
    )
    assert flops.peak_flops(torch.device("cuda"), precision) == pytest.approx(tflops * 1e12)


def test_cpu_is_measured_without_changing_the_random_generator() -> None:
    state = torch.get_rng_state()
    assert 1e8 < flops.peak_flops(torch.device("cpu"), "fp32") < 1e14
    assert torch.equal(torch.get_rng_state(), state)
    assert flops.peak_flops(torch.device("meta"), "fp32") == 0

"""The chunked loss: equal value and gradients, without the logits of the whole batch."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2LMHeadModel
from transformers.loss.loss_utils import ForCausalLMLoss

from models.nets import gpt
from tests.support import workers
from train.parallel.strategy import Ddp, Strategy
from train.parallel.zero import DeepSpeed

VOCABULARY, CONTEXT, BATCH = 97, 12, 5
LOGITS = BATCH * CONTEXT * VOCABULARY
CHUNK = 7 * VOCABULARY  # seven rows at a time: of 60 rows the last chunk has four

Gradients = dict[str, torch.Tensor]


def small_model(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return gpt.build(VOCABULARY, CONTEXT, width=16, layers=2, heads=2).type(dtype)


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets (B, T), some of them ignored: single ones, and a whole chunk."""
    ids = torch.randint(
        VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(seed)
    )
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 3] = targets[2, 7] = -100
    targets.view(-1)[14:21] = -100
    return inputs, targets


def value_and_gradients(
    model: GPT2LMHeadModel, loss: torch.Tensor
) -> tuple[torch.Tensor, Gradients]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.fixture(params=["at once", "in chunks"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in chunks":
        monkeypatch.setattr(gpt, "MAX_LOGITS", CHUNK)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_equals_transformers(dtype: torch.dtype, tolerance: float, reduction: Any) -> None:
    model, (inputs, targets) = small_model(dtype), batch()
    logits = model(input_ids=inputs).logits
    if dtype == torch.float64:  # transformers' loss would round to fp32
        theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    else:
        theirs = ForCausalLMLoss(logits, None, VOCABULARY, shift_labels=targets)
    counted = int((targets != -100).sum())
    scale = counted if reduction == "sum" else 1
    expected, gradients = value_and_gradients(model, theirs * scale)
    found, found_gradients = value_and_gradients(
        model, gpt.NextTokenLoss(model)(inputs, targets, reduction)
    )
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=tolerance)
    torch.testing.assert_close(found_gradients, gradients, atol=tolerance * scale, rtol=tolerance)


@pytest.mark.usefixtures("either_way")
def test_loss_is_the_same_without_gradients() -> None:
    objective = gpt.NextTokenLoss(small_model())
    inputs, targets = batch()
    trained = objective(inputs, targets, "sum").detach()
    with torch.no_grad():
        torch.testing.assert_close(objective(inputs, targets, "sum"), trained)


@pytest.mark.usefixtures("either_way")
def test_gradients_are_scaled_and_accumulated() -> None:
    model, (inputs, targets) = small_model(), batch()
    objective = gpt.NextTokenLoss(model)
    _, once = value_and_gradients(model, objective(inputs, targets))
    model.zero_grad()
    for weight in (2.0, 0.5):
        (weight * objective(inputs, targets)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2.5 * once[name])


def test_chunked_loss_in_bf16_equals_bf16_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[torch.Tensor, Gradients]:
        model, (inputs, targets) = small_model(), batch()
        with torch.autocast("cpu", torch.bfloat16):
            loss = gpt.NextTokenLoss(model)(inputs, targets)
        return value_and_gradients(model, loss)

    loss, gradients = run()
    monkeypatch.setattr(gpt, "MAX_LOGITS", CHUNK)
    found, found_gradients = run()
    assert found.dtype == loss.dtype == torch.float32
    # Both compute a loss in fp32 from the same bf16 logits.
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        assert found_gradients[name].dtype == torch.float32
        off = float((found_gradients[name] - gradient).norm() / gradient.norm())
        assert off < 2**-6, (name, off)  # bf16 rounds by up to 2**-8, once per product


@pytest.mark.usefixtures("either_way")
def test_bf16_model_has_an_fp32_loss() -> None:
    inputs, targets = batch()
    model = small_model()
    expected = gpt.NextTokenLoss(model)(inputs, targets)
    found, gradients = value_and_gradients(
        model, gpt.NextTokenLoss(model.bfloat16())(inputs, targets)
    )
    assert found.dtype == torch.float32
    assert found == pytest.approx(float(expected.detach()), abs=0.02)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest storage that any operation reads or writes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, out)):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(
                    self.elements, leaf.untyped_storage().nbytes() // leaf.element_size()
                )
        return out


def largest_tensor(evaluate: bool = False) -> int:
    """Return the size of the largest tensor in a forward and backward, or only a forward."""
    model, (inputs, targets) = small_model(), batch()
    with LargestTensor() as largest, torch.set_grad_enabled(not evaluate):
        loss = gpt.NextTokenLoss(model)(inputs, targets)
        if not evaluate:
            loss.backward()
    return largest.elements


@pytest.mark.parametrize("evaluate", [False, True])
def test_logits_of_a_long_batch_never_exist_together(
    evaluate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_tensor(evaluate) == LOGITS  # without chunks they do
    monkeypatch.setattr(gpt, "MAX_LOGITS", CHUNK)
    inside_mlp = BATCH * CONTEXT * 4 * 16
    assert CHUNK < inside_mlp < LOGITS
    assert largest_tensor(evaluate) == inside_mlp


# ---------------------------------------------------------------- wrapped by DDP and DeepSpeed


def five_steps(rank: int, folder: str) -> None:
    """Train five steps with every strategy; write the losses and the final embedding (the head)."""
    result = {}
    for stage in (None, 1, 2, 3):
        for size in (LOGITS, CHUNK):
            gpt.MAX_LOGITS = size
            result[stage, size] = trained(
                Ddp() if stage is None else DeepSpeed(stage=stage, micro_size=BATCH)
            )
    torch.save(result, f"{folder}/{rank}.pt")


def trained(strategy: Strategy) -> tuple[list[float], torch.Tensor]:
    model = small_model()
    learner = strategy.learner(
        "model",
        gpt.NextTokenLoss(model),
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        clip=1.0,
        model=model,
    )
    losses = []
    for step in range(5):
        with learner.accumulating(0, 1):
            loss = learner(*batch(10 * step + strategy.rank))
            learner.backward(loss)
        learner.step()
        losses.append(float(loss))
    head = model.lm_head.weight
    with (
        strategy.deepspeed.zero.GatheredParameters([head])
        if isinstance(strategy, DeepSpeed) and strategy.stage == 3
        else nullcontext()
    ):
        return losses, head.detach().clone()


def test_two_workers_train_equally_in_chunks_and_at_once(tmp_path: Path) -> None:
    workers.spawn(2, five_steps, str(tmp_path))
    untrained = small_model().lm_head.weight.detach()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        expected_losses, expected_weight = result[None, LOGITS]  # DDP, all logits at once
        assert (expected_weight - untrained).abs().max() > 0.02
        for how, (losses, weight) in result.items():
            assert losses == pytest.approx(expected_losses, abs=1e-5), how
            off = float((weight - expected_weight).abs().max())
            assert off < 2e-4, (how, off)  # of five steps of 0.01

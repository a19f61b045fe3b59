"""The loss of a long batch is the loss of its parts: the same value and gradients, and never all of its logits."""

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
PIECE = 7 * VOCABULARY  # seven rows at a time: 60 rows end in a piece of four

Gradients = dict[str, torch.Tensor]


def small_model(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return gpt.build(VOCABULARY, CONTEXT, width=16, layers=2, heads=2).type(dtype)


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T), of which some are not judged: single ones, and a whole piece."""
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


@pytest.fixture(params=["at once", "in pieces"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in pieces":
        monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", PIECE)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_transformers_own(dtype: torch.dtype, tolerance: float, reduction: Any) -> None:
    model, (inputs, targets) = small_model(dtype), batch()
    logits = model(input_ids=inputs).logits
    if dtype == torch.float64:  # which transformers' own would round to fp32
        theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    else:
        theirs = ForCausalLMLoss(logits, None, VOCABULARY, shift_labels=targets)
    judged = int((targets != -100).sum())
    scale = judged if reduction == "sum" else 1
    expected, gradients = value_and_gradients(model, theirs * scale)
    found, found_gradients = value_and_gradients(
        model, gpt.NextTokenLoss(model)(inputs, targets, reduction)
    )
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=tolerance)
    torch.testing.assert_close(found_gradients, gradients, atol=tolerance * scale, rtol=tolerance)


@pytest.mark.usefixtures("either_way")
def test_judging_without_gradients_gives_the_same_loss() -> None:
    objective = gpt.NextTokenLoss(small_model())
    inputs, targets = batch()
    trained = objective(inputs, targets, "sum").detach()
    with torch.no_grad():
        torch.testing.assert_close(objective(inputs, targets, "sum"), trained)


@pytest.mark.usefixtures("either_way")
def test_a_gradient_is_scaled_and_added_up() -> None:
    model, (inputs, targets) = small_model(), batch()
    objective = gpt.NextTokenLoss(model)
    _, once = value_and_gradients(model, objective(inputs, targets))
    model.zero_grad()
    for weight in (2.0, 0.5):
        (weight * objective(inputs, targets)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2.5 * once[name])


def test_bf16_in_pieces_is_bf16_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[torch.Tensor, Gradients]:
        model, (inputs, targets) = small_model(), batch()
        with torch.autocast("cpu", torch.bfloat16):
            loss = gpt.NextTokenLoss(model)(inputs, targets)
        return value_and_gradients(model, loss)

    loss, gradients = run()
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", PIECE)
    found, found_gradients = run()
    assert found.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(
        found, loss, atol=1e-5, rtol=1e-5
    )  # the same bf16 logits, judged in fp32
    for name, gradient in gradients.items():
        assert found_gradients[name].dtype == torch.float32
        off = float((found_gradients[name] - gradient).norm() / gradient.norm())
        assert off < 2**-6, (name, off)  # bf16 rounds by up to 2**-8, once per product


@pytest.mark.usefixtures("either_way")
def test_a_bf16_model_has_a_loss_in_fp32() -> None:
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
    """Notes the elements of the largest storage that any operation touches or makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, out)):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(
                    self.elements, leaf.untyped_storage().nbytes() // leaf.element_size()
                )
        return out


def largest_tensor(judge: bool = False) -> int:
    """In one forward and backward, or in one forward without gradients."""
    model, (inputs, targets) = small_model(), batch()
    with LargestTensor() as noted, torch.set_grad_enabled(not judge):
        loss = gpt.NextTokenLoss(model)(inputs, targets)
        if not judge:
            loss.backward()
    return noted.elements


@pytest.mark.parametrize("judge", [False, True])
def test_the_logits_of_a_long_batch_never_exist(
    judge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_tensor(judge) == LOGITS  # the count sees what is to be avoided
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", PIECE)
    inside_mlp = BATCH * CONTEXT * 4 * 16
    assert PIECE < inside_mlp < LOGITS
    assert largest_tensor(judge) == inside_mlp


# ---------------------------------------------------------------- under what wraps it


def five_steps(rank: int, folder: str) -> None:
    """Two workers, five steps in every way; each writes its losses and its final embedding (which is the head too)."""
    result = {}
    for stage in (None, 1, 2, 3):
        for piece in (LOGITS, PIECE):
            gpt.LOGITS_AT_ONCE = piece
            result[stage, piece] = trained(
                Ddp() if stage is None else DeepSpeed(stage=stage, micro_size=BATCH)
            )
    torch.save(result, f"{folder}/{rank}.pt")


def trained(spread: Strategy) -> tuple[list[float], torch.Tensor]:
    model = small_model()
    learner = spread.learner(
        "model",
        gpt.NextTokenLoss(model),
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        clip=1.0,
        core=model,
    )
    losses = []
    for step in range(5):
        with learner.accumulating(0, 1):
            loss = learner(*batch(10 * step + spread.rank))
            learner.backward(loss)
        learner.step()
        losses.append(float(loss))
    head = model.lm_head.weight
    with (
        spread.deepspeed.zero.GatheredParameters([head])
        if isinstance(spread, DeepSpeed) and spread.stage == 3
        else nullcontext()
    ):
        return losses, head.detach().clone()


def test_two_workers_learn_the_same_in_pieces(tmp_path: Path) -> None:
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

"""Trains a GPT on packed text with Ray Train: `python -m train gpt --config gpt-tiny`."""

import itertools
import math
import os
import shutil
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from models.nets import gpt
from train.config.sections import GptConfig
from train.data import text
from train.data.dataset import fetch
from train.data.order import Order, positions, rng
from train.parallel.average import Average
from train.parallel.state import Halt, State
from train.parallel.strategy import Strategy
from train.run.flops import gpt_flops, peak_flops
from train.run.recorder import Meter, finite
from train.run.worker import Worker

JUDGED_TOKENS = 2048  # that a worker judges at once: under ZeRO-3 each forward gathers the parameters, however small its batch


def train(worker: Worker, start: tuple[int, State] | None) -> dict[str, Any]:
    """The loop of one worker; returns the run's final metrics (the same on every worker)."""
    config, strategy, recorder = worker.config, worker.strategy, worker.recorder
    folder = fetch(worker.dataset)
    tokens = text.Tokens(folder, "train", config.model.context)
    heldout = text.Tokens(folder, "heldout", config.model.context)
    order = Order(len(tokens), config.run.seed)

    torch.manual_seed(config.run.seed)
    model = build(config, tokens.meta).to(
        strategy.device
    )  # before the optimizer: its state goes where the parameters are
    step, saved = start or (0, None)
    if saved is not None:
        gpt.restore(model, saved["model"])
    learner = strategy.learner(
        "model",
        objective(config, model, strategy),
        adamw(config, model),
        config.optim.clip,
        saved,
        core=model,
    )
    average = Average(learner, config.optim.ema_decay, saved) if config.optim.ema_decay else None
    judged_weights = average.applied if average else nullcontext
    model.train()

    flops = step_flops(config, model, tokens.meta["vocab_size"])
    meter = Meter(
        "tokens_per_s",
        config.tokens_per_step,
        flops,
        peak_flops(strategy.device, strategy.precision) * strategy.world_size,
    )

    def loss_of(places: np.ndarray) -> torch.Tensor:
        with meter.waiting("data"):
            batch = torch.from_numpy(tokens.batch(order, places)).to(strategy.device)
        with strategy.autocast():
            return learner(batch[:, :-1], batch[:, 1:])

    learner.rehearse(lambda: loss_of(np.arange(config.micro_size)))
    final: dict[str, Any] = {}
    while step < config.steps:
        share = positions(
            step, config.batch.global_size, config.micro_size, strategy.rank, strategy.world_size
        )
        learner.set_lr(learning_rate(config, step))
        loss = torch.zeros((), device=strategy.device)
        for number, places in enumerate(share):
            # Dropout's noise: a function of where we are, not of what was drawn before.
            torch.manual_seed(
                int(rng(config.run.seed, step, number, strategy.rank, 2).integers(2**63))
            )
            with learner.accumulating(number, len(share)):
                part = loss_of(places)
                learner.backward(part)
            loss += part.detach() / len(share)
        worker.reached("update", step + 1)
        norm = learner.step()
        if average:
            average.update(step)
        step += 1
        meter.count()

        last = step == config.steps
        if worker.measures_at(step):
            figures = finite(strategy.mean({"loss": float(loss), **learner.figures(norm)}), step)
            recorder.scalars(
                step, {**figures, "lr": learning_rate(config, step - 1), **meter.read()}
            )
        with meter.paused():
            judged: dict[str, float] = {}
            if step % config.log.eval_every == 0 or last:
                with meter.waiting("eval"), judged_weights():
                    judged = finite(evaluate(model, heldout, strategy), step)
                recorder.scalars(step, judged)
                final = {**judged, "loss": figures["loss"]}
                worker.report({"step": step, **final, **meter.total()})
            if step % config.log.sample_every == 0 or last:
                # Every worker writes the same text, though one is enough: under ZeRO-3 none has the weights alone.
                with meter.waiting("sample"), judged_weights():
                    recorder.text(step, "text", sample(config, model, folder))
            if worker.saves_at(step, bool(judged)):
                recorder.flush()  # a run resumed from here has its curves up to here
                with meter.waiting("checkpoint"):
                    worker.checkpoints.save(
                        step,
                        learner.state() | (average.state() if average else {}),
                        judged.get("heldout_loss"),
                    )
    with meter.waiting("checkpoint"):
        worker.checkpoints.join()
    strategy.barrier()
    if not final:  # interrupted between its last checkpoint and its end: nothing is left to train, and still to be judged
        with judged_weights():
            final = evaluate(model, heldout, strategy)
    return final | meter.total()


def check(config: GptConfig, dataset: dict[str, Any]) -> None:
    """Whether the config fits a data set (its dataset.json), without loading anything.

    Raises:
        ValueError: fewer tokens than one sample, or a pretrained model of other sizes.
    """
    sizes, tokens = config.model, dataset["splits"]["train"]["tokens"]
    if tokens < 2 * sizes.context + 1:
        raise ValueError(
            f"the data have {tokens} tokens to train on, and model.context is {sizes.context}: use a smaller context, or more text"
        )
    if sizes.pretrained is None:
        return
    given = gpt.read_config(sizes.pretrained)
    if given.vocab_size != dataset["vocab_size"]:
        raise ValueError(
            f"model.pretrained {sizes.pretrained} has {given.vocab_size} tokens and the tokenizer {dataset['vocab_size']}: "
            f"use the tokenizer it was trained with, e.g. --data.tokenizer {sizes.pretrained}"
        )
    if given.n_positions < sizes.context:
        raise ValueError(
            f"model.context is {sizes.context}, and model.pretrained {sizes.pretrained} sees {given.n_positions} tokens at most"
        )


def build(config: GptConfig, dataset: dict[str, Any]) -> Any:
    """The model of a config over a data set's vocabulary, from fresh or pretrained weights; see `check` for what must fit."""
    sizes = config.model
    if sizes.pretrained is not None:
        return gpt.load(sizes.pretrained, sizes.dropout)
    return gpt.build(
        dataset["vocab_size"],
        sizes.context,
        sizes.width,
        sizes.layers,
        sizes.heads,
        sizes.dropout,
        dataset["eos_token_id"],
    )


def step_flops(config: GptConfig, model: Any, vocab_size: int) -> int:
    """Floating-point operations of one optimizer step, over all workers (see train/run/flops.py)."""
    sizes = model.config
    # From the sizes: under ZeRO-3 the parameters themselves are elsewhere. The four matrices of a block, and the embedding.
    matrices = 12 * sizes.n_layer * sizes.n_embd**2 + vocab_size * sizes.n_embd
    return (
        gpt_flops(matrices, sizes.n_layer, sizes.n_embd, config.model.context)
        * config.tokens_per_step
    )


def learning_rate(config: GptConfig, step: int) -> float:
    """The rate of update `step` (from 0): linear warm-up, then held, then as optim.schedule says, to zero at the end."""
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    held = max(optim.warmup_steps, int(optim.hold * config.steps))
    if optim.schedule == "constant" or step < held:
        return optim.lr
    left = (config.steps - step) / max(config.steps - held, 1)  # 1 -> 0
    return optim.lr * (
        left if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))
    )


@torch.no_grad()
def evaluate(model: Any, heldout: text.Tokens, strategy: Strategy) -> dict[str, float]:
    """Cross-entropy on every held-out token, each seen with at most `context` before it.

    Returns:
        heldout_loss: nats a token; heldout_bits_per_byte: bits a byte of UTF-8 text (comparable over tokenizers).
    """
    model.eval()
    loss = gpt.NextTokenLoss(model)
    nats, judged = 0.0, 0
    windows = heldout.every_window(strategy.rank, strategy.world_size)
    batch_size = max(JUDGED_TOKENS // heldout.context, 1)
    # As many batches on every worker, the last ones perhaps padding: under ZeRO-3 all of them take part in each forward.
    for _ in range(math.ceil(heldout.num_windows / (strategy.world_size * batch_size))):
        batch = list(itertools.islice(windows, batch_size)) or [heldout.nothing()]
        inputs, targets = (
            torch.from_numpy(np.stack(part)).to(strategy.device)
            for part in zip(*batch, strict=True)
        )
        with strategy.autocast():
            nats += float(loss(inputs, targets, reduction="sum"))
        judged += int((targets >= 0).sum())
    model.train()
    total_nats, total_judged = strategy.sum([nats, judged])
    return {
        "heldout_loss": total_nats / total_judged,
        "heldout_bits_per_byte": total_nats / math.log(2) / heldout.split["text_bytes"],
    }


def objective(config: GptConfig, model: Any, strategy: Strategy) -> nn.Module:
    """What is trained: the model with its loss, compiled where the config says so.

    Raises:
        Halt: a worker has no C++ compiler.
    """
    loss = gpt.NextTokenLoss(model)
    if not config.compile:
        return loss
    (without,) = strategy.sum([shutil.which(os.environ.get("CXX", "g++")) is None])
    if without:
        raise Halt(
            f"compile is true, and {without:.0f} of {strategy.world_size} workers have no C++ compiler: install g++ there, or use --compile false"
        )
    if strategy.device.type == "cpu":
        # Compiled for several threads, the embedding's gradient is summed in whatever order they come.
        torch.use_deterministic_algorithms(True)
    loss.compile(
        dynamic=False
    )  # in place, before any wrapper: one graph, and the parameters keep their names
    return loss


def adamw(config: GptConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    groups = gpt.parameter_groups(model, config.optim.weight_decay)
    return torch.optim.AdamW(
        groups, lr=config.optim.lr, betas=(config.optim.beta1, config.optim.beta2), fused=True
    )


def sample(config: GptConfig, model: Any, folder: Any) -> str:
    """Text that the model writes after sample.prompt."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = config.sample
    ids = [text.end_of_text(tokenizer), *tokenizer.encode(settings.prompt).ids]
    written = gpt.sample(
        model,
        ids,
        settings.tokens,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        seed=config.run.seed,
    )
    return settings.prompt + tokenizer.decode(written)

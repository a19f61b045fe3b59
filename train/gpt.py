"""Trains a GPT on packed text with Ray Train: `python -m train gpt --config gpt-tiny`."""

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from models import gpt
from train import text
from train.checkpoint import State
from train.config import GptConfig
from train.dataset import fetch
from train.launch import Worker
from train.metrics import Meter, finite
from train.order import Order, positions, rng
from train.strategy import Ddp


def train(worker: Worker, start: tuple[int, State] | None) -> dict[str, Any]:
    """The loop of one worker; returns the run's final metrics (the same on every worker)."""
    config, strategy, recorder = worker.config, worker.strategy, worker.recorder
    folder = fetch(worker.dataset)
    tokens = text.Tokens(folder, "train", config.model.context)
    heldout = text.Tokens(folder, "heldout", config.model.context)
    order = Order(len(tokens), config.run.seed)

    torch.manual_seed(config.run.seed)
    model = build(config, tokens.meta).to(strategy.device)  # before the optimizer: its state goes where the parameters are
    optimizer = torch.optim.AdamW(
        gpt.parameter_groups(model, config.optim.weight_decay),
        lr=config.optim.lr,
        betas=(config.optim.beta1, config.optim.beta2),
        fused=True,
    )
    step = 0
    if start is not None:
        step, state = start
        gpt.restore(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
    parallel = strategy.prepare(model)
    model.train()

    meter = Meter("tokens_per_s", config.tokens_per_step)
    final: dict[str, Any] = {}
    while step < config.steps:
        share = positions(step, config.batch.global_size, config.micro_size, strategy.rank, strategy.world_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = torch.zeros((), device=strategy.device)
        for number, places in enumerate(share):
            # Dropout's noise: a function of where we are, not of what was drawn before.
            torch.manual_seed(int(rng(config.run.seed, step, number, strategy.rank, 2).integers(2**63)))
            batch = torch.from_numpy(tokens.batch(order, places)).to(strategy.device)
            with strategy.accumulating(parallel, last=number == len(share) - 1):
                with strategy.autocast():
                    part = gpt.loss(parallel, batch[:, :-1], batch[:, 1:]) / len(share)
                strategy.backward(part)
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        meter.count()

        last = step == config.steps
        if step % config.log.every == 0 or last:
            figures = finite(strategy.mean({"loss": float(loss), "grad_norm": float(norm)}), step)
            recorder.scalars(step, {**figures, "lr": learning_rate(config, step - 1), **meter.read()})
        with meter.paused():
            if step % config.log.eval_every == 0 or last:
                judged = evaluate(model, heldout, strategy, config.batch.micro_size)
                recorder.scalars(step, judged)
                final = {**judged, **strategy.mean({"loss": float(loss)}), **meter.total()}
                worker.report({"step": step, **final})
            if strategy.rank == 0 and (step % config.log.sample_every == 0 or last):
                recorder.text(step, "text", sample(config, model, folder))
            if step % config.checkpoint.every == 0 or last:
                recorder.flush()  # a run resumed from here has its curves up to here
                worker.checkpoints.save(step, {"model": gpt.weights(model), "optimizer": optimizer.state_dict()})
    worker.checkpoints.join()
    strategy.barrier()
    # Interrupted between its last checkpoint and its end: nothing is left to train, and still to be judged.
    return final or evaluate(model, heldout, strategy, config.batch.micro_size)


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
    return gpt.build(dataset["vocab_size"], sizes.context, sizes.width, sizes.layers, sizes.heads, sizes.dropout, dataset["eos_token_id"])


def learning_rate(config: GptConfig, step: int) -> float:
    """The rate of update `step` (from 0): linear warm-up, then held, then as optim.schedule says, to zero at the end."""
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    held = max(optim.warmup_steps, int(optim.hold * config.steps))
    if optim.schedule == "constant" or step < held:
        return optim.lr
    left = (config.steps - step) / max(config.steps - held, 1)  # 1 -> 0
    return optim.lr * (left if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))


@torch.no_grad()
def evaluate(model: nn.Module, heldout: text.Tokens, strategy: Ddp, batch_size: int) -> dict[str, float]:
    """Cross-entropy on every held-out token, each seen with at most `context` before it.

    Returns:
        heldout_loss: nats a token; heldout_bits_per_byte: bits a byte of UTF-8 text (comparable over tokenizers).
    """
    model.eval()
    nats, judged = 0.0, 0
    windows = heldout.every_window(strategy.rank, strategy.world_size)
    while batch := list(itertools.islice(windows, batch_size)):
        inputs, targets = (torch.from_numpy(np.stack(part)).to(strategy.device) for part in zip(*batch, strict=True))
        with strategy.autocast():
            nats += float(gpt.loss(model, inputs, targets, reduction="sum"))
        judged += int((targets >= 0).sum())
    model.train()
    total_nats, total_judged = strategy.sum([nats, judged])
    return {"heldout_loss": total_nats / total_judged, "heldout_bits_per_byte": total_nats / math.log(2) / heldout.split["text_bytes"]}


def sample(config: GptConfig, model: Any, folder: Any) -> str:
    """Text that the model writes after sample.prompt."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = config.sample
    ids = [text.end_of_text(tokenizer), *tokenizer.encode(settings.prompt).ids]
    written = gpt.sample(model, ids, settings.tokens, settings.temperature, settings.top_k, settings.top_p, seed=config.run.seed)
    return settings.prompt + tokenizer.decode(written)

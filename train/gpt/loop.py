"""The GPT's training loop: `python -m train gpt --config gpt-tiny`."""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2LMHeadModel

from models.nets import gpt
from train.data import text
from train.data.dataset import Dataset
from train.data.order import Order, positions, rng
from train.data.tokenizer import end_of_text
from train.gpt.config import GptConfig
from train.gpt.model import build, build_loss, build_optimizer, step_flops
from train.gpt.schedule import learning_rate
from train.parallel.average import Average
from train.parallel.state import State
from train.parallel.strategy import Strategy
from train.run.flops import peak_flops
from train.run.meter import Meter
from train.run.recorder import check_finite
from train.run.worker import Worker

# Per worker and forward: under ZeRO-3 each forward gathers the parameters, however small its batch.
EVALUATION_TOKENS = 2048
DROPOUT = 2  # the purpose of a random draw, which sets its key apart


def train(worker: Worker[GptConfig], resumed: tuple[int, State] | None) -> dict[str, float]:
    """Run the training loop on one worker.

    Args:
        worker: this worker.
        resumed: (step, state) of the checkpoint to resume from, or None.

    Returns:
        The run's final metrics, the same on every worker.
    """
    # ---- set up
    config, strategy, recorder = worker.config, worker.strategy, worker.recorder
    tokens = text.Tokens(worker.dataset, "train", config.model.context)
    heldout = text.Tokens(worker.dataset, "heldout", config.model.context)
    order = Order(len(tokens), config.run.seed)

    torch.manual_seed(config.run.seed)
    # On the device before the optimizer is built: its state is created beside the parameters.
    model = build(config, worker.dataset)
    model.to(strategy.device)  # type: ignore[arg-type]  # a wrapper hides torch's signature
    step, saved = resumed or (0, None)
    if saved is not None:
        gpt.restore(model, saved["model"])
    loss_module = build_loss(config, model, strategy)
    optimizer = build_optimizer(config, model)
    learner = strategy.learner(
        "model", loss_module, optimizer, config.optim.clip, saved, model=model
    )
    average = Average(learner, config.optim.ema_decay, saved) if config.optim.ema_decay else None
    averaged_weights = average.applied if average else nullcontext
    model.train()

    flops = step_flops(config, model, tokens.meta["vocab_size"])
    peak = peak_flops(strategy.device, strategy.precision) * strategy.world_size
    meter = Meter("tokens_per_s", config.tokens_per_step, flops, peak)

    def loss_at(micro_batch: np.ndarray) -> Tensor:
        with meter.waiting("data"):
            batch = torch.from_numpy(tokens.batch(order, micro_batch)).to(strategy.device)
        with strategy.autocast():
            loss: Tensor = learner(batch[:, :-1], batch[:, 1:])
        return loss

    learner.warm_up(lambda: loss_at(np.arange(config.micro_size)))
    final: dict[str, float] = {}
    while step < config.steps:
        # ---- one optimizer step
        micro_batches = positions(
            step, config.batch.global_size, config.micro_size, strategy.rank, strategy.world_size
        )
        learner.set_lr(learning_rate(config, step))
        loss = torch.zeros((), device=strategy.device)
        for number, micro_batch in enumerate(micro_batches):
            # Dropout's noise is a function of the position, not of earlier draws.
            draw = rng(config.run.seed, step, number, strategy.rank, DROPOUT)
            torch.manual_seed(int(draw.integers(2**63)))
            with learner.accumulating(number, len(micro_batches)):
                micro_loss = loss_at(micro_batch)
                learner.backward(micro_loss)
            loss += micro_loss.detach() / len(micro_batches)
        worker.hooks.gradients_ready(step + 1)
        norm = learner.step()
        if average:
            average.update(step)
        step += 1
        meter.count()

        # ---- once in a while: log, evaluate, sample, save
        if worker.measures_at(step):
            means = strategy.mean({"loss": float(loss), **learner.metrics(norm)})
            metrics = check_finite(means, step)
            lr = learning_rate(config, step - 1)
            recorder.metrics(step, {**metrics, "lr": lr, **meter.read()})
        with meter.paused():
            evaluated: dict[str, float] = {}
            if worker.evaluates_at(step):
                with meter.waiting("eval"), averaged_weights():
                    evaluated = check_finite(evaluate(model, heldout, strategy), step)
                recorder.metrics(step, evaluated)
                final = {**evaluated, "loss": metrics["loss"]}
                worker.report({"step": step, **final, **meter.total()})
            if worker.samples_at(step):
                # On every worker, though one would do: under ZeRO-3 none has the weights alone.
                with meter.waiting("sample"), averaged_weights():
                    recorder.text(step, "text", sample(config, model, worker.dataset))
            if worker.saves_at(step, bool(evaluated)):
                recorder.flush()  # a run resumed from here has its curves up to here
                state = learner.state() | (average.state() if average else {})
                with meter.waiting("checkpoint"):
                    worker.checkpoints.save(step, state, evaluated.get("heldout_loss"))
    with meter.waiting("checkpoint"):
        worker.checkpoints.join()
    strategy.barrier()
    if not final:
        # Interrupted after its last checkpoint: all steps are done, the evaluation is not.
        with averaged_weights():
            final = evaluate(model, heldout, strategy)
    return final | meter.total()


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, heldout: text.Tokens, strategy: Strategy) -> dict[str, float]:
    """Compute the cross-entropy of every held-out token, each with at most `context` before it.

    Returns:
        heldout_loss, nats per token, and heldout_bits_per_byte, bits per byte of UTF-8 text, which
        is comparable between tokenizers.
    """
    model.eval()
    loss = gpt.NextTokenLoss(model)
    nats, count = 0.0, 0
    windows = heldout.every_window(strategy.rank, strategy.world_size)
    batch_size = max(EVALUATION_TOKENS // heldout.context, 1)
    # The same number of batches on every worker, the last ones perhaps padding: under ZeRO-3 all
    # workers take part in each forward.
    for _ in range(math.ceil(heldout.num_windows / (strategy.world_size * batch_size))):
        batch = list(itertools.islice(windows, batch_size)) or [heldout.padding()]
        inputs, targets = (
            torch.from_numpy(np.stack(part)).to(strategy.device)
            for part in zip(*batch, strict=True)
        )
        with strategy.autocast():
            nats += float(loss(inputs, targets, reduction="sum"))
        count += int((targets >= 0).sum())
    model.train()
    total_nats, total_count = strategy.sum([nats, count])
    text_bytes = heldout.split["text_bytes"]
    return {
        "heldout_loss": total_nats / total_count,
        "heldout_bits_per_byte": total_nats / math.log(2) / text_bytes,
    }


def sample(config: GptConfig, model: GPT2LMHeadModel, dataset: Dataset) -> str:
    """Return sample.prompt and the text that the model writes after it."""
    tokenizer = Tokenizer.from_file(str(dataset.fetch() / "tokenizer.json"))
    settings = config.sample
    ids = [end_of_text(tokenizer), *tokenizer.encode(settings.prompt).ids]
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

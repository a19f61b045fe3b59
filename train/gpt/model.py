"""Build what a GPT's run trains: the model, its loss, its optimizer."""

import os
import shutil

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from models.nets import gpt
from train.data.dataset import Dataset
from train.data.text import meta_of
from train.gpt.config import GptConfig
from train.parallel.state import Halt
from train.parallel.strategy import Strategy
from train.run.flops import gpt_flops


def build(config: GptConfig, dataset: Dataset) -> GPT2LMHeadModel:
    """Return the model of a config over a data set's vocabulary, with fresh or pretrained weights.

    See `Gpt.check` for what must fit together.
    """
    sizes, meta = config.model, meta_of(dataset)
    if sizes.pretrained is not None:
        return gpt.load(sizes.pretrained, sizes.dropout)
    return gpt.build(
        meta["vocab_size"],
        sizes.context,
        sizes.width,
        sizes.layers,
        sizes.heads,
        sizes.dropout,
        meta["eos_token_id"],
    )


def build_loss(config: GptConfig, model: GPT2LMHeadModel, strategy: Strategy) -> nn.Module:
    """Return the model together with its loss, compiled where the config says so.

    Raises:
        Halt: a worker has no C++ compiler.
    """
    loss = gpt.NextTokenLoss(model)
    if not config.compile:
        return loss
    (without,) = strategy.sum([shutil.which(os.environ.get("CXX", "g++")) is None])
    if without:
        raise Halt(
            f"compile is true, and {without:.0f} of {strategy.world_size} workers have no C++ "
            "compiler: install g++ there, or use --compile false"
        )
    if strategy.device.type == "cpu":
        # Compiled code sums the embedding's gradient over threads in any order.
        torch.use_deterministic_algorithms(True)
    # In place, before any wrapper: one graph, and the parameters keep their names.
    loss.compile(dynamic=False)
    return loss


def build_optimizer(config: GptConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only."""
    groups = gpt.parameter_groups(model, config.optim.weight_decay)
    betas = (config.optim.beta1, config.optim.beta2)
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=betas, fused=True)


def step_flops(config: GptConfig, model: GPT2LMHeadModel, vocab_size: int) -> int:
    """Return the floating-point operations per optimizer step, over all workers."""
    sizes = model.config
    # Counted from the sizes: under ZeRO-3 a worker does not hold whole parameters. A block has 12
    # D^2 parameters in matrices; the embedding is the output layer too.
    parameters = 12 * sizes.n_layer * sizes.n_embd**2 + vocab_size * sizes.n_embd
    per_token = gpt_flops(parameters, sizes.n_layer, sizes.n_embd, config.model.context)
    return per_token * config.tokens_per_step

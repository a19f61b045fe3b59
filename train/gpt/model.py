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


def check(config: GptConfig, dataset: Dataset) -> None:
    """Check that the config fits the data set, without loading anything.

    Raises:
        ValueError: there are fewer tokens than one sample has, or the pretrained model has other
            sizes.
    """
    sizes, meta = config.model, meta_of(dataset)
    tokens = meta["splits"]["train"]["tokens"]
    if tokens < 2 * sizes.context + 1:
        raise ValueError(
            f"the data have {tokens} tokens to train on, and model.context is {sizes.context}: use "
            "a smaller context, or more text"
        )
    if sizes.pretrained is None:
        return
    pretrained = gpt.read_config(sizes.pretrained)
    if pretrained.vocab_size != meta["vocab_size"]:
        raise ValueError(
            f"model.pretrained {sizes.pretrained} has {pretrained.vocab_size} tokens and the "
            f"tokenizer {meta['vocab_size']}: use the tokenizer it was trained with, e.g. "
            f"--data.tokenizer {sizes.pretrained}"
        )
    if pretrained.n_positions < sizes.context:
        raise ValueError(
            f"model.context is {sizes.context}, and model.pretrained {sizes.pretrained} attends to "
            f"{pretrained.n_positions} tokens at most"
        )


def build(config: GptConfig, dataset: Dataset) -> GPT2LMHeadModel:
    """Return the model of a config over a data set's vocabulary, with fresh or pretrained weights.

    See `check` for what must fit together.
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

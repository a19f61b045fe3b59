"""GPT-2 on transformers, its loss and sampling.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

model = build(vocab_size=2048, context=128, width=128, layers=4, heads=4)
loss = NextTokenLoss(model)(ids[:, :-1], ids[:, 1:])
tokens = sample(model, prompt_ids, num_tokens=100, temperature=0.7, top_k=50, seed=0)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

IGNORED = -100  # a target that does not count
MAX_LOGITS = 2**23  # computed at a time; 32 MiB in fp32. On CPU, fewer and more are slower.


def build(
    vocab_size: int,
    context: int,
    width: int,
    layers: int,
    heads: int,
    dropout: float = 0.0,
    eos_token_id: int | None = None,
) -> GPT2LMHeadModel:
    """Return a GPT-2 whose weights are initialized as in the paper, from torch's current seed."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            use_cache=False,
        )
    )


def read_config(folder: str) -> GPT2Config:
    """Return the config of a transformers checkpoint folder.

    Raises:
        ValueError: the folder contains no GPT-2.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"model.pretrained: {folder} has no config.json: use a folder that save_pretrained "
            "wrote"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, GPT2Config):
        raise ValueError(f"model.pretrained: {folder} contains a {config.model_type}, not a GPT-2")
    return config


def load(folder: str, dropout: float = 0.0) -> GPT2LMHeadModel:
    """Load a GPT-2 in fp32 from a transformers checkpoint folder (config.json, model.safetensors).

    Raises:
        ValueError: the folder contains no GPT-2, or it is damaged.
    """
    config = read_config(folder)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    config.use_cache = False
    try:
        return GPT2LMHeadModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # transformers raises many unrelated types for a damaged folder
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.pretrained: {folder} cannot be loaded as a GPT-2: {reason}"
        ) from error


class NextTokenLoss(nn.Module):
    """A GPT-2 with its training loss: the cross-entropy of the next token, in nats.

    DDP, DeepSpeed or torch.compile wraps this module: its forward contains everything from token
    ids to loss. Where the logits of a batch (B x T x V) exceed `MAX_LOGITS`, the loss is computed
    in chunks, so that they never exist together in memory. transformers' own loss shifts and
    upcasts a copy of all of them.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> torch.Tensor:
        """Return the loss, a scalar in fp32 or fp64.

        Args:
            inputs: token ids (B, T).
            targets: the ids that follow them (B, T); `IGNORED` does not count.
            reduction: "mean" over the targets that count, or "sum".
        """
        hidden = self.model.transformer(input_ids=inputs).last_hidden_state.flatten(0, 1)  # (BT, D)
        targets = targets.flatten()
        rows = max(MAX_LOGITS // self.model.config.vocab_size, 1)
        nats: torch.Tensor
        if len(targets) > rows and torch.is_grad_enabled():
            nats = _ChunkedCrossEntropy.apply(hidden, self.model.lm_head.weight, targets, rows)
        else:
            chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
            nats = torch.stack([self._summed_loss(*chunk) for chunk in chunks]).sum()
        return nats if reduction == "sum" else nats / (targets != IGNORED).sum()

    def _summed_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model.lm_head(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORED, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of `hidden @ weight.T`; forward also computes the gradients.

    The gradient of a chunk's logits is softmax - one-hot: only the scale of the loss is unknown
    until backward (Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training").
    torch.nn.functional.linear_cross_entropy does the same, but ignores autocast, and given bf16 it
    returns the loss and accumulates the weight's gradient in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """Return the loss, a scalar in fp32 or fp64.

        Args:
            ctx: autograd's context.
            hidden: (N, D).
            weight: (V, D).
            targets: (N).
            rows: how many of the N to compute at a time.
        """
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        wide = torch.promote_types(dtype, torch.float32)
        nats = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=wide)
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(targets), rows):
                chunk = slice(start, start + rows)
                states, classes = hidden[chunk].to(dtype), targets[chunk].unsqueeze(1)
                ignored = classes == IGNORED
                log_p = F.log_softmax(states @ head.T, dim=-1, dtype=wide)  # (rows, V)
                nats += F.nll_loss(log_p, targets[chunk], ignore_index=IGNORED, reduction="sum")
                logits_grad = log_p.exp_()
                logits_grad.scatter_add_(
                    1, classes.masked_fill(ignored, 0), torch.full_like(classes, -1, dtype=wide)
                )
                lowered = logits_grad.masked_fill_(ignored, 0).to(dtype)
                hidden_grad[chunk] = lowered @ head
                if dtype == wide:
                    weight_grad.addmm_(lowered.T, states)  # needs no temporary of the weight's size
                else:
                    weight_grad += lowered.T @ states
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * scale, weight_grad * scale, None, None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices with weight decay, biases and norms without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {
            "params": [parameter for parameter in parameters if parameter.dim() >= 2],
            "weight_decay": weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.dim() < 2],
            "weight_decay": 0.0,
        },
    ]


def restore(model: GPT2LMHeadModel, state: Mapping[str, torch.Tensor]) -> None:
    """Load parameters, named as in transformers.

    `state` does not contain the output matrix, which is the token embedding.
    """
    model.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})


@torch.no_grad()
def sample(
    model: GPT2LMHeadModel,
    ids: list[int],
    num_tokens: int,
    temperature: float = 0.7,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Generate tokens after a prompt. When the context is full, the window slides.

    Args:
        model: is put into eval mode meanwhile.
        ids: of the prompt; at least one.
        num_tokens: how many to generate.
        temperature: of the softmax; 0 takes the likeliest token each time.
        top_k: sample from the k likeliest tokens; 0: from all.
        top_p: sample from the likeliest tokens whose probabilities add up to p.
        seed: of the samples.

    Returns:
        The generated ids, without the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.train(False)
    device = next(model.parameters()).device
    tokens = list(ids)
    cache = None
    for _ in range(num_tokens):
        if cache is None:
            window = tokens[-model.config.n_positions :]
        elif cache.get_seq_length() == model.config.n_positions:
            # Positions are absolute, so a window that slides needs a new cache. It starts half
            # full, so that this happens once in T / 2 tokens.
            cache, window = None, tokens[-(model.config.n_positions // 2) :]
        else:
            window = tokens[-1:]
        out = model(
            input_ids=torch.tensor([window], device=device), past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        tokens.append(
            _sample_one(out.logits[0, -1].float().cpu(), temperature, top_k, top_p, generator)
        )
    model.train(training)
    return tokens[len(ids) :]


def _sample_one(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Sample a token from logits (V): top-k, then top-p (nucleus; Holtzman et al. 2020)."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, logits.numel())).values[-1], float("-inf")
        )
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # The token with which the sum reaches top_p stays.
        probabilities[order[ordered.cumsum(-1) - ordered >= top_p]] = 0
    return int(torch.multinomial(probabilities / probabilities.sum(), 1, generator=generator))

"""The GPT-2 family on transformers (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

model = build(vocab_size=2048, context=128, width=128, layers=4, heads=4)
loss = NextTokenLoss(model)(ids[:, :-1], ids[:, 1:])
tokens = sample(model, prompt_ids, num_tokens=100, temperature=0.7, top_k=50, seed=0)
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

IGNORED = -100  # a target that is not judged
LOGITS_AT_ONCE = 2**23  # 32 MiB in fp32; on CPU smaller and larger pieces are slower


def build(
    vocab_size: int,
    context: int,
    width: int,
    layers: int,
    heads: int,
    dropout: float = 0.0,
    eos_token_id: int | None = None,
) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights: initialised as in the paper, from torch's current seed."""
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
    """The sizes in a transformers checkpoint folder.

    Raises:
        ValueError: there is no GPT-2 in it.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"model.pretrained: {folder} has no config.json: expected a folder written by save_pretrained"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, GPT2Config):
        raise ValueError(f"model.pretrained: {folder} holds a {config.model_type}, not a GPT-2")
    return config


def load(folder: str, dropout: float = 0.0) -> GPT2LMHeadModel:
    """A GPT-2 from a transformers checkpoint folder (config.json, model.safetensors), in fp32.

    Raises:
        ValueError: the folder holds no GPT-2, or a damaged one.
    """
    config = read_config(folder)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    config.use_cache = False
    try:
        return GPT2LMHeadModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # transformers raises many unrelated types for a damaged folder
        raise ValueError(
            f"model.pretrained: {folder} can't be loaded as a GPT-2: {str(error).splitlines()[0]}"
        ) from error


class NextTokenLoss(nn.Module):
    """A GPT-2 and its training objective: the cross-entropy of the next token, in nats.

    This is what DDP, DeepSpeed or torch.compile wraps: everything between token ids and loss happens in its
    forward. A batch whose logits (B x T x V) exceed LOGITS_AT_ONCE is judged in pieces, so that the logits of the
    whole batch never exist. transformers' own loss shifts and upcasts a copy of all of them.
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
        """The loss, a scalar of at least fp32.

        Args:
            inputs: token ids (B, T).
            targets: the ids that follow them (B, T); -100 is not judged.
            reduction: "mean" over the judged tokens, or "sum".
        """
        hidden = self.model.transformer(input_ids=inputs).last_hidden_state.flatten(
            0, 1
        )  # (B T, D)
        targets = targets.flatten()
        rows = max(LOGITS_AT_ONCE // self.model.config.vocab_size, 1)
        if len(targets) > rows and torch.is_grad_enabled():
            nats = _ChunkedCrossEntropy.apply(hidden, self.model.lm_head.weight, targets, rows)
        else:
            pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
            nats = torch.stack([self._judge(*piece) for piece in pieces]).sum()
        return nats if reduction == "sum" else nats / (targets != IGNORED).sum()

    def _judge(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model.lm_head(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORED, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, its gradients computed with it, piece by piece.

    The gradient of a piece's logits is softmax - one-hot, so it needs nothing that comes later but the scale of
    the loss (Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training").
    torch.nn.functional.linear_cross_entropy does the same, but knows no autocast, and given bf16 it returns the
    loss and adds up the weight's gradient in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """hidden (N, D), weight (V, D), targets (N) -> a scalar; `rows` of the N at a time."""
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
                piece = slice(start, start + rows)
                states, classes = hidden[piece].to(dtype), targets[piece].unsqueeze(1)
                ignored = classes == IGNORED
                log_p = F.log_softmax(states @ head.T, dim=-1, dtype=wide)  # (rows, V)
                nats += F.nll_loss(log_p, targets[piece], ignore_index=IGNORED, reduction="sum")
                logits_grad = log_p.exp_()
                logits_grad.scatter_add_(
                    1, classes.masked_fill(ignored, 0), torch.full_like(classes, -1, dtype=wide)
                )
                lowered = logits_grad.masked_fill_(ignored, 0).to(dtype)
                hidden_grad[piece] = lowered @ head
                if dtype == wide:
                    weight_grad.addmm_(
                        lowered.T, states
                    )  # without a product of the weight's size beside it
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
    """Matrices with weight decay, vectors (biases, norms) without."""
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


def restore(model: GPT2LMHeadModel, state: dict[str, torch.Tensor]) -> None:
    """Loads a model's parameters by transformers' names, the output matrix left out: it is the token embedding."""
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
    """`num_tokens` tokens after `ids`; temperature 0 takes the likeliest each time.

    The window slides when the context is full.
    """
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    tokens = list(ids)
    cache = None
    for _ in range(num_tokens):
        if cache is None:
            window = tokens[-model.config.n_positions :]
        elif cache.get_seq_length() == model.config.n_positions:
            # Positions are absolute, so a slid window needs a new cache: half full, to slide once in T / 2 tokens.
            cache, window = None, tokens[-(model.config.n_positions // 2) :]
        else:
            window = tokens[-1:]
        out = model(
            input_ids=torch.tensor([window], device=device), past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        tokens.append(_draw(out.logits[0, -1].float().cpu(), temperature, top_k, top_p, generator))
    model.train(training)
    return tokens[len(ids) :]


def _draw(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token from logits (V): top-k, then nucleus (Holtzman et al. 2020), then a draw."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, logits.numel())).values[-1], float("-inf")
        )
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        probabilities[order[ordered.cumsum(-1) - ordered >= top_p]] = (
            0  # the first token to reach top_p stays
        )
    return int(torch.multinomial(probabilities / probabilities.sum(), 1, generator=generator))

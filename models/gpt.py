"""The GPT-2 family on transformers (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

model = build(vocab_size=2048, context=128, width=128, layers=4, heads=4)
tokens = sample(model, prompt_ids, num_tokens=100, temperature=0.7, top_k=50, seed=0)
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel


def build(
    vocab_size: int, context: int, width: int, layers: int, heads: int, dropout: float = 0.0, eos_token_id: int | None = None
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
        raise ValueError(f"model.pretrained: {folder} has no config.json: expected a folder written by save_pretrained")
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
        return GPT2LMHeadModel.from_pretrained(folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    except Exception as error:  # transformers raises many unrelated types for a damaged folder
        raise ValueError(f"model.pretrained: {folder} can't be loaded as a GPT-2: {str(error).splitlines()[0]}") from error


def loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of the next token in nats.

    transformers' own loss shifts and upcasts a copy of all logits; handing the targets over already shifted
    costs a sixth of a step less on CPU.

    Args:
        inputs: token ids (B, T).
        targets: the ids that follow them (B, T); -100 is not judged.
        reduction: "mean" over the judged tokens, or "sum".
    """
    logits = model(input_ids=inputs).logits  # (B, T, V)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-100, reduction=reduction)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (biases, norms) without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def weights(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """The state under transformers' names, without the output matrix: it is the token embedding."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def restore(model: GPT2LMHeadModel, state: dict[str, torch.Tensor]) -> None:
    """Loads what `weights` gave."""
    model.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})


@torch.no_grad()
def sample(
    model: GPT2LMHeadModel, ids: list[int], num_tokens: int, temperature: float = 0.7, top_k: int = 50, top_p: float = 1.0, seed: int = 0
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
        out = model(input_ids=torch.tensor([window], device=device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(_draw(out.logits[0, -1].float().cpu(), temperature, top_k, top_p, generator))
    model.train(training)
    return tokens[len(ids) :]


def _draw(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token from logits (V): top-k, then nucleus (Holtzman et al. 2020), then a draw."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.numel())).values[-1], float("-inf"))
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        probabilities[order[ordered.cumsum(-1) - ordered >= top_p]] = 0  # the first token to reach top_p stays
    return int(torch.multinomial(probabilities / probabilities.sum(), 1, generator=generator))

"""The config of a GPT's run."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from train.config.data import TextData
from train.config.sections import Config, Fraction, Positive, Section


class GptModel(Section):
    """The size of the model."""

    pretrained: str | None = None
    """A transformers checkpoint folder to start from; its sizes replace the ones below."""
    width: Positive = 768
    """Size of the embeddings and of the hidden states."""
    layers: Positive = 12
    """Transformer blocks."""
    heads: Positive = 12
    """Attention heads per block; they divide the width."""
    context: Annotated[int, Field(ge=8)] = 1024
    """Tokens of a training sample, and the most that the model attends to."""
    dropout: Fraction = 0.0
    """Dropout of embeddings, attention and residual branches while training."""

    @model_validator(mode="after")
    def _check_heads(self) -> "GptModel":
        if self.width % self.heads:
            raise ValueError(
                f"model.width is {self.width}, which {self.heads} heads (model.heads) cannot "
                "share evenly: use a multiple of model.heads"
            )
        return self


class GptOptim(Section):
    """AdamW, gradient clipping, the learning rate schedule, and the average of the weights."""

    lr: Annotated[float, Field(gt=0)] = 5e-5
    """The highest learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of matrices; biases and norms are not decayed."""
    beta1: Fraction = 0.9
    """AdamW's decay of the first moment."""
    beta2: Fraction = 0.999
    """AdamW's decay of the second moment."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0: no clipping."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """The learning rate after warm-up: constant, or decayed to zero at the last step."""
    hold: Fraction = 0.0
    """The fraction of the steps for which the learning rate is held before it decays."""
    ema_decay: Fraction = 0.0
    """Decay of the moving average of the weights, which is then sampled, evaluated and exported;
    0: no average."""


class Sample(Section):
    """How the samples of text are drawn."""

    prompt: str = "\n"
    """Text that the samples continue."""
    tokens: Positive = 200
    """Tokens per sample."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Sampling temperature; 0: the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 50
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens that together reach this probability."""


class GptConfig(Config):
    """A GPT's run."""

    kind: ClassVar[str] = "gpt"
    changeable: ClassVar[tuple[str, ...]] = ("sample.",)

    data: TextData = TextData()
    model: GptModel = GptModel()
    optim: GptOptim = GptOptim()
    sample: Sample = Sample()

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all workers."""
        return self.batch.global_size * self.model.context

    @model_validator(mode="after")
    def _check_compile(self) -> "GptConfig":
        parallel = self.parallel
        if self.compile and parallel.strategy == "deepspeed" and parallel.zero_stage == 3:
            raise ValueError(
                "compile: ZeRO stage 3 gathers parameters inside the graph, which breaks it: use "
                "--parallel.zero_stage 2, or --compile false"
            )
        return self

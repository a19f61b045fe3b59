"""The config of a GAN's run."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from train.config.data import ImageData
from train.config.sections import Config, Fraction, OptionalPath, Positive, Section


def _refuse_batch_norm(value: object) -> object:
    if value == "batch":
        raise ValueError(
            "model.critic_norm batch is unsupported: the critic's score of an image would depend "
            "on the others in its batch, and the gradient penalty constrains the score of each "
            "image alone; use layer or none"
        )
    return value


class GanModel(Section):
    """The size and the normalization of generator and critic."""

    latent_dim: Positive = 128
    """Size of the generator's latent vector."""
    width: Positive = 32
    """Channels at the finest resolution; they double with each halving of it."""
    conditional: bool = False
    """Condition generator and critic on the class."""
    norm: Literal["group", "batch"] = "group"
    """The generator's: group normalizes each image alone, batch by the statistics of the global
    batch."""
    critic_norm: Annotated[Literal["none", "layer"], BeforeValidator(_refuse_batch_norm)] = "none"
    """The critic's: layer normalizes the features of each image alone."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the generator's weights, which is sampled, evaluated and
    exported."""


class GanObjective(Section):
    """What critic and generator minimize, and in which ratio they are updated."""

    objective: Literal["wgan-gp", "lsgan", "hinge", "non-saturating"] = "wgan-gp"
    """The losses of critic and generator."""
    critic_steps: Positive = 5
    """Critic updates before each generator update."""
    penalty_weight: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the critic's gradient penalty (wgan-gp: between real and fake images, 10 in the
    paper; the others: R1, 10 as measured); 0: none."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What a detected collapse of the generator does: warn, or also end the run."""


class GanOptim(Section):
    """Adam for both networks."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """The generator's learning rate."""
    critic_lr: Annotated[float, Field(gt=0)] | None = None
    """The critic's learning rate (default: the generator's)."""
    beta1: Fraction = 0.0
    """Adam's decay of the first moment."""
    beta2: Fraction = 0.9
    """Adam's decay of the second moment."""


class Quality(Section):
    """How generated images are evaluated."""

    samples: Annotated[int, Field(ge=10)] = 2000
    """Generated images per evaluation, compared with as many held-out ones where there are."""
    inception: OptionalPath = None
    """A file with Inception's weights (torch-fidelity's weights-inception-2015-12-05-6726825d.pth)
    to compute the FID too; needs the extra `inception`."""


class GanConfig(Config):
    """A GAN's run."""

    kind: ClassVar[str] = "gan"
    # Metrics depend on the data set, its feature extractor and the number of images.
    evaluation_keys: ClassVar[tuple[str, ...]] = ("data.", "quality.")
    changeable: ClassVar[tuple[str, ...]] = (
        "quality.inception",
        "gan.critic_steps",
        "gan.on_collapse",
    )

    data: ImageData = ImageData()
    model: GanModel = GanModel()
    gan: GanObjective = GanObjective()
    optim: GanOptim = GanOptim()
    quality: Quality = Quality()

    @model_validator(mode="after")
    def _check_unsupported(self) -> "GanConfig":
        parallel = self.parallel
        if self.compile:
            raise ValueError(
                "compile: torch.compile cannot differentiate the critic's penalty twice: leave it "
                "false for a GAN"
            )
        if parallel.strategy == "deepspeed" and parallel.zero_stage == 3:
            raise ValueError(
                "parallel.zero_stage is 3, which partitions the parameters again before the "
                "critic's penalty is differentiated a second time; use 0, 1 or 2"
            )
        if self.model.norm == "batch" and self.accumulation > 1:
            raise ValueError(
                "model.norm batch takes its statistics from the global batch, which "
                f"{self.accumulation} micro-batches per step would split: use --batch.micro_size "
                f"{self.batch.global_size // parallel.workers}, or --model.norm group"
            )
        return self

"""The sections of a config that every kind of run has.

A field's docstring is its help text. Derived values are properties.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def as_list(value: object) -> object:
    """Accept one path where a list of paths is expected."""
    return [value] if isinstance(value, str) else value


def as_integer(value: object) -> object:
    """Accept the command line's digits where a literal integer is expected."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def as_absolute_path(value: object) -> object:
    """Make a path absolute: workers run in other directories."""
    return str(Path(str(value)).absolute()) if value else value


Values: TypeAlias = dict[str, Any]
"""The values of a config, nested by section or flat by dotted key."""

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Paths = Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)]
OptionalPath = Annotated[str | None, BeforeValidator(as_absolute_path)]


class Section(BaseModel):
    """A part of the config. Unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )


class Run(Section):
    """Identity and resumption of a run."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder below runs/ (default: made from the preset's name and the time)."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume from the newest checkpoint, start where there is none; never: refuse a run that
    has a checkpoint; must: refuse a run that has none."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initial weights, sample order and noise."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run stops."""


class Batch(Section):
    """Batch sizes. They are global: the number of workers does not change them."""

    global_size: Positive = 32
    """Samples per optimizer step, over all workers."""
    micro_size: Positive = 16
    """Samples that a worker processes at once; the gradients of its further micro-batches are
    accumulated."""


class Parallel(Section):
    """Workers, their devices, and how training is distributed over them."""

    workers: Positive = 1
    """Worker processes; one GPU each with parallel.gpu."""
    strategy: Literal["ddp", "deepspeed"] = "ddp"
    """ddp replicates the model and its optimizer; deepspeed partitions what zero_stage says."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(as_integer)] = 1
    """DeepSpeed: 0 partitions nothing, 1 the optimizer state, 2 the gradients too, 3 the
    parameters too."""
    offload: bool = False
    """DeepSpeed: keep the optimizer state in CPU memory and update there; for GPUs."""
    gpu: bool = False
    """One GPU per worker (NCCL); otherwise CPU (gloo)."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs that a worker reserves; also its number of threads."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16: autocast (fp16 with a gradient scaler); parameters, optimizer state and the
    GAN's penalty stay fp32."""

    @model_validator(mode="after")
    def _check_deepspeed(self) -> "Parallel":
        if self.offload and (self.strategy != "deepspeed" or self.zero_stage == 0):
            raise ValueError(
                "parallel.offload moves DeepSpeed's partitioned optimizer state: "
                "use --parallel.strategy deepspeed and a zero_stage of 1 to 3"
            )
        if self.offload and not self.gpu:
            raise ValueError(
                "parallel.offload moves the optimizer state from a GPU to CPU memory: "
                "without parallel.gpu it is there already"
            )
        if self.precision == "fp16" and self.strategy == "deepspeed":
            raise ValueError(
                "parallel.precision fp16 is unsupported with DeepSpeed, whose gradient scaler is "
                "not in our checkpoints, so a resume would differ: use bf16, or "
                "--parallel.strategy ddp"
            )
        return self


class Checkpoint(Section):
    """When checkpoints are written and which are kept."""

    every: Positive = 200
    """Steps between checkpoints; the last step always has one."""
    keep_last: Positive = 2
    """How many of the newest are kept; an older one is deleted when a newer one is complete."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """How many of the best on held-out data are kept besides; each evaluation (log.eval_every)
    then writes a checkpoint too."""


class Log(Section):
    """When metrics, evaluations and samples are recorded."""

    every: Positive = 10
    """Steps between measurements of loss and speed."""
    eval_every: Positive = 200
    """Steps between evaluations on held-out data; the last step always has one."""
    sample_every: Positive = 200
    """Steps between samples of text or images; the last step always has one."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases: online sends while the run trains, offline writes wandb/ into the run's
    folder for `wandb sync`."""
    wandb_project: str = "raykiln"
    """The project on Weights & Biases."""


class Config(Section):
    """What the configs of all kinds of runs have in common."""

    kind: ClassVar[str]
    """The kind's name in `train.kinds.KINDS`."""
    changeable: ClassVar[tuple[str, ...]] = ()
    """The kind's own keys that may differ when a run resumes; "sample." is a whole section."""
    evaluation_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that change how runs are evaluated, so that a search must not vary them."""

    run: Run = Run()
    batch: Batch = Batch()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    steps: Positive = 1000
    """Optimizer steps (GAN: generator steps) of the whole run."""
    compile: bool = False
    """torch.compile (GPT only): slower to start, then faster."""

    @property
    def micro_size(self) -> int:
        """Samples that a worker processes at once: batch.micro_size, or its whole part of the
        global batch where that is smaller."""
        return min(self.batch.micro_size, self.batch.global_size // self.parallel.workers)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step and worker."""
        return self.batch.global_size // (self.micro_size * self.parallel.workers)

    def to_yaml(self) -> str:
        """Return the config as the YAML that `train.config.loader.load` reads."""
        values = {"kind": self.kind, **self.model_dump()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @model_validator(mode="after")
    def _check_batch(self) -> "Config":
        size, workers = self.batch.global_size, self.parallel.workers
        if size % workers:
            raise ValueError(
                f"batch.global_size is {size}, which {workers} workers cannot share evenly: "
                "use a multiple of parallel.workers"
            )
        per_worker = size // workers
        if per_worker % self.micro_size:
            raise ValueError(
                f"batch.micro_size is {self.batch.micro_size}, which does not divide a worker's "
                f"{per_worker} samples (batch.global_size / parallel.workers): use a divisor of "
                f"{per_worker}"
            )
        return self

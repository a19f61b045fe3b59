"""The one config of a run: defaults < preset or file (YAML) < command line, the same dotted keys everywhere.

    python -m train gpt --config gpt-tiny --optim.lr 1e-3 --dry-run

A field's docstring is its help text. Derived values are properties.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

PRESETS = Path(__file__).parent.parent / "presets"

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Paths = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


def _integer(value: Any) -> Any:
    """The command line gives digits where a literal number is wanted."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _no_batch_norm(value: Any) -> Any:
    if value == "batch":
        raise ValueError(
            "model.critic_norm batch: a critic's score of one picture would depend on the others beside it, "
            "and the gradient penalty is a statement about each alone; use layer or none"
        )
    return value


class Section(BaseModel):
    """A part of the config; unknown keys are refused and docstrings below fields become their help."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )


class Run(Section):
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder below runs/; without a name, one is made from the preset's and the time."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on where the run's newest checkpoint is, start where there is none; never: refuse a run that has one; must: refuse a run that has none."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides initial weights, sample order and noise."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How many lost workers the run survives before it gives up."""


class Batch(Section):
    global_size: Positive = 32
    """Samples behind one optimizer step, over all workers."""
    micro_size: Positive = 16
    """Samples that a worker holds at once; what is left of its share is accumulated."""


class Parallel(Section):
    workers: Positive = 1
    """Processes that train together, one GPU each where GPUs are used."""
    strategy: Literal["ddp", "deepspeed"] = "ddp"
    """How the work is spread: ddp replicates the model and its optimizer; deepspeed spreads over the workers what zero_stage says."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_integer)] = 1
    """DeepSpeed: 0 replicates all, 1 spreads the optimizer's state, 2 the gradients too, 3 the parameters too."""
    offload: bool = False
    """DeepSpeed: keeps the optimizer's state in the CPU's memory and updates there; for GPUs."""
    gpu: bool = False
    """One GPU a worker (NCCL); otherwise CPU (gloo)."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs that a worker reserves, and its threads."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: autocast, fp16 with a gradient scaler; parameters, optimizer and the GAN's penalty stay fp32."""

    @model_validator(mode="after")
    def _deepspeed_can(self) -> "Parallel":
        if self.offload and (self.strategy != "deepspeed" or self.zero_stage == 0):
            raise ValueError(
                "parallel.offload moves DeepSpeed's spread optimizer: use --parallel.strategy deepspeed and a zero_stage of 1 to 3"
            )
        if self.offload and not self.gpu:
            raise ValueError(
                "parallel.offload moves the optimizer from a GPU to the CPU's memory: without parallel.gpu it is there already"
            )
        if self.precision == "fp16" and self.strategy == "deepspeed":
            raise ValueError(
                "parallel.precision fp16: the state of DeepSpeed's own gradient scaler is not saved by us, so a resume would differ; use bf16, or --parallel.strategy ddp"
            )
        return self


class Checkpoint(Section):
    every: Positive = 200
    """Steps between checkpoints; the last step always has one."""
    keep_last: Positive = 2
    """How many are kept; older ones are deleted when a newer one is complete."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """How many of the best on held-out data are kept beside those; each judgement (log.eval_every) then makes a checkpoint too."""


class Log(Section):
    every: Positive = 10
    """Steps between measurements of loss and speed."""
    eval_every: Positive = 200
    """Steps between judgements on held-out data; the last step always has one."""
    sample_every: Positive = 200
    """Steps between samples of text or pictures; the last step always has one."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases: online sends as it goes, offline writes wandb/ into the run's folder for `wandb sync`."""
    wandb_project: str = "raykiln"


class Base(Section):
    run: Run = Run()
    batch: Batch = Batch()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    steps: Positive = 1000
    """Optimizer steps (GAN: generator steps) of the whole run."""
    compile: bool = False
    """torch.compile for the model: slower to start, faster to go; for the GPT."""

    @property
    def kind(self) -> str:
        raise NotImplementedError

    @property
    def micro_size(self) -> int:
        """Samples a worker holds at once: batch.micro_size, or its whole share where that is smaller."""
        return min(self.batch.micro_size, self.batch.global_size // self.parallel.workers)

    @property
    def accumulation(self) -> int:
        """Micro-batches behind one optimizer step."""
        return self.batch.global_size // (self.micro_size * self.parallel.workers)

    @model_validator(mode="after")
    def _global_batch_divides(self) -> "Base":
        size, workers = self.batch.global_size, self.parallel.workers
        if size % workers:
            raise ValueError(
                f"batch.global_size is {size}, which {workers} workers can't share evenly: use a multiple of parallel.workers"
            )
        share = size // workers
        if share % self.micro_size:
            raise ValueError(
                f"batch.micro_size is {self.batch.micro_size}, which does not divide a worker's share of {share} (batch.global_size / parallel.workers)"
            )
        return self


class TextData(Section):
    source: Paths = ["shakespeare"]
    """shakespeare (shipped), or files, folders, globs or URIs of .txt, .md, .jsonl or .parquet, or hf:NAME."""
    text_column: str = "text"
    """The column or key that holds the text in .jsonl and .parquet."""
    heldout: Paths | None = None
    """Files judged on and never trained on; by default those that the data itself marks, or a share of the documents."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """What is held out where nothing says which: of .jsonl and .parquet this share of the documents, of .txt and .md the end of each."""
    tokenizer: str = "bpe"
    """bpe: trained on the corpus; gpt2: GPT-2's (shipped); or a pretrained tokenizer's folder or tokenizer.json."""
    vocab_size: Annotated[int, Field(ge=257, le=2**31)] = 2048
    """Entries of a tokenizer trained here (256 bytes and the end-of-text mark included)."""

    @property
    def known_vocab_size(self) -> int:
        """Entries as far as they are known before the tokenizer is read."""
        return 50257 if self.tokenizer == "gpt2" else self.vocab_size


class GptModel(Section):
    pretrained: str | None = None
    """A transformers checkpoint folder to start from; its sizes then replace the ones below."""
    width: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    context: Annotated[int, Field(ge=8)] = 1024
    """Tokens that the model sees at once, and that one training sample holds."""
    dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "GptModel":
        if self.width % self.heads:
            raise ValueError(
                f"model.width is {self.width}, which {self.heads} heads (model.heads) can't share evenly"
            )
        return self


class GptOptim(Section):
    lr: Annotated[float, Field(gt=0)] = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """On matrices only: biases and norms are left alone."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 does not clip."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up: held, or decayed to zero at the last step."""
    hold: Fraction = 0.0
    """The share of the steps for which the learning rate is held before it decays."""
    ema_decay: Fraction = 0.0
    """The averaged model, which is then sampled, judged and exported, keeps this share of itself at each step; 0: no average."""


class Sample(Section):
    prompt: str = "\n"
    tokens: Positive = 200
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_k: Annotated[int, Field(ge=0)] = 50
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens that together reach this probability."""


class GptConfig(Base):
    data: TextData = TextData()
    model: GptModel = GptModel()
    optim: GptOptim = GptOptim()
    sample: Sample = Sample()

    @model_validator(mode="after")
    def _what_compiles(self) -> "GptConfig":
        if self.compile and self.parallel.strategy == "deepspeed" and self.parallel.zero_stage == 3:
            raise ValueError(
                "compile: ZeRO stage 3 gathers parameters in the middle of the graph, which breaks it; use --parallel.zero_stage 2, or --compile false"
            )
        return self

    @property
    def kind(self) -> str:
        return "gpt"

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_size * self.model.context


class ImageData(Section):
    source: Paths = ["fashion-mnist"]
    """fashion-mnist, emoji (shipped; emoji are in colour), a folder of class folders, parquet files with an image column, torchvision:NAME or hf:NAME."""
    image_column: str = "image"
    label_column: str = "label"
    size: Annotated[Literal[28, 32, 64, 128], BeforeValidator(_integer)] = 32
    """Pixels a side."""
    channels: Annotated[Literal[1, 3], BeforeValidator(_integer)] = 1
    random_crop: bool = False
    """Enlarge by an eighth and cut at a random place."""
    horizontal_flip: bool = True
    """Mirror every other picture."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of pictures held out where the data itself does not say which."""


class GanModel(Section):
    latent_dim: Positive = 128
    width: Positive = 32
    """Channels at the finest resolution; they double with each halving of it."""
    conditional: bool = False
    """Generator and critic are told the class."""
    norm: Literal["group", "batch"] = "group"
    """The generator's: group normalises each picture by itself, batch by the statistics of the global batch."""
    critic_norm: Annotated[Literal["none", "layer"], BeforeValidator(_no_batch_norm)] = "none"
    """layer: each picture's features are normalised by themselves."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """The averaged generator, which is sampled, judged and exported, keeps this share of itself at each step."""


class GanObjective(Section):
    objective: Literal["wgan-gp", "lsgan", "hinge", "non-saturating"] = "wgan-gp"
    """What critic and generator minimise."""
    critic_steps: Positive = 5
    """Critic updates before each generator update."""
    penalty_weight: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the critic's gradient penalty (wgan-gp: between real and fake pictures, 10 by the paper; the others: R1, 10 as measured); 0: none."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What happens when the generator is seen to collapse: a warning, or the end of the run too."""


class GanOptim(Section):
    lr: Annotated[float, Field(gt=0)] = 2e-4
    critic_lr: Annotated[float, Field(gt=0)] | None = None
    """By default the generator's."""
    beta1: Fraction = 0.0
    beta2: Fraction = 0.9


class Quality(Section):
    samples: Annotated[int, Field(ge=10)] = 2000
    """Pictures judged: generated ones against as many held-out ones, as far as there are."""
    inception: Annotated[
        str | None, BeforeValidator(lambda value: value and str(Path(str(value)).absolute()))
    ] = None
    """A file with Inception's weights (torch-fidelity's weights-inception-2015-12-05-6726825d.pth), to have the FID too; needs the extra `inception`."""


class GanConfig(Base):
    data: ImageData = ImageData()
    model: GanModel = GanModel()
    gan: GanObjective = GanObjective()
    optim: GanOptim = GanOptim()
    quality: Quality = Quality()

    @property
    def kind(self) -> str:
        return "gan"

    @model_validator(mode="after")
    def _what_a_gan_bears(self) -> "GanConfig":
        parallel = self.parallel
        if self.compile:
            raise ValueError(
                "compile: torch.compile can't differentiate the critic's penalty twice; leave it false for a GAN"
            )
        if parallel.strategy == "deepspeed" and parallel.zero_stage == 3:
            raise ValueError(
                "parallel.zero_stage is 3, whose parameters are scattered again before the critic's penalty is differentiated twice; use 0, 1 or 2"
            )
        if self.model.norm == "batch" and self.accumulation > 1:
            raise ValueError(
                f"model.norm batch takes its statistics from the global batch, which {self.accumulation} micro-batches a step would split: "
                f"use --batch.micro_size {self.batch.global_size // parallel.workers}, or --model.norm group"
            )
        return self


Config = GptConfig | GanConfig
KINDS: dict[str, type[GptConfig] | type[GanConfig]] = {"gpt": GptConfig, "gan": GanConfig}
Model = TypeVar("Model", bound=Base)


# What DDP and others offer and we refuse to: said where a bare "there is no key" would send one searching.
REFUSED = {
    "parallel.static_graph": "DDP would plan the exchange of gradients at the first step, and leaves out part of a critic's whose penalty is differentiated twice, without an error",
}


def keys(model: type[BaseModel], above: str = "") -> list[str]:
    """Every dotted key of a config, e.g. ["run.name", ..., "optim.lr", ...]."""
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{above}{name}.")
        else:
            found.append(above + name)
    return found


def nearest(key: str, valid: list[str]) -> str:
    """`, did you mean ...?` for a misspelt key, or the empty string where nothing is near."""
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in valid}
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.6) or [
        by_leaf[leaf]
        for leaf in difflib.get_close_matches(
            key.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.7
        )
    ]
    return f", did you mean {close[0]}?" if close else ""


def _no_such(what: str, key: str, valid: list[str]) -> str:
    return (
        f"{what} {key} is refused: {REFUSED[key]}"
        if key in REFUSED
        else f"there is no {what} {key}{nearest(key, valid)}"
    )


def build(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """The validated config.

    Raises:
        ValueError: the first thing wrong, with its dotted key, the value given and `where` it came from.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
        if problem["type"] == "extra_forbidden":
            raise ValueError(f"{where}: {_no_such('key', key, keys(model))}") from None
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"{where}: {message}"
            if problem["type"] == "value_error"
            else f"{where}: {key} is {problem['input']!r}: {message}"
        ) from None


def _is_branch(part: int | str) -> bool:
    """Whether pydantic put a union's branch into a location (`critic_lr.constrained-float`), which is no key of ours."""
    return isinstance(part, str) and (
        "[" in part or part in {"str", "float", "int"} or part.startswith("constrained")
    )


def read(kind: str, config: str | None) -> tuple[dict[str, Any], str]:
    """The values of a preset's name or a YAML file, and where they came from."""
    if config is None:
        return {}, f"{kind} defaults"
    path = PRESETS / f"{config}.yaml"
    if not path.is_file():
        path = Path(config)
    if not path.is_file():
        presets = [file.stem for file in sorted(PRESETS.glob(f"{kind}-*.yaml"))]
        near = difflib.get_close_matches(config, presets, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"presets: {', '.join(presets)}"
        raise ValueError(f"--config {config}: neither a preset nor a file; {hint}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not keys and values")
    if values.pop("kind", kind) != kind:
        raise ValueError(
            f"{path} is the config of another kind of run: use `python -m train {'gan' if kind == 'gpt' else 'gpt'}`"
        )
    return values, str(path)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values, those `above` winning."""
    merged = dict(below)
    for key, value in above.items():
        merged[key] = (
            merge(merged[key], value)
            if isinstance(value, dict) and isinstance(merged.get(key), dict)
            else value
        )
    return merged


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1} as {"optim": {"lr": 1}}."""
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return values


def parse(kind: str, arguments: list[str]) -> dict[str, Any]:
    """The nested values that the command line gives (`--optim.lr 3e-4 ...`).

    Raises:
        ValueError: an unknown key, with the nearest valid one, or a key without a value.
    """
    model = KINDS[kind]
    valid = keys(model)
    for argument in arguments:
        name = argument.split("=", 1)[0].removeprefix("--")
        if argument.startswith("--") and name not in [*valid, *model.model_fields, "help"]:
            raise ValueError(_no_such("option", name, valid).replace(f" {name}", f" --{name}", 1))
    command_line = type("CommandLine", (BaseSettings, model), {})
    try:
        return CliSettingsSource(
            command_line,
            cli_prog_name=f"python -m train {kind}",
            cli_parse_args=arguments,
            cli_exit_on_error=False,
        )()
    except SettingsError as error:
        raise ValueError(str(error).removeprefix("error parsing CLI: ")) from None


def load(kind: str, config: str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The config of a run: defaults < `config` (a preset's name or a YAML file) < `overrides` (dotted or nested keys).

    Raises:
        ValueError: one sentence on what is wrong and where.
    """
    values, where = read(kind, config)
    if overrides:
        where += " with the command line's values"
    return build(KINDS[kind], merge(values, nested(overrides or {})), where)


def dump(config: Config) -> str:
    """The config as the YAML that `load` takes."""
    return yaml.safe_dump(
        {"kind": config.kind, **config.model_dump()}, sort_keys=False, allow_unicode=True
    )

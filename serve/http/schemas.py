"""The HTTP API's requests and responses, in OpenAI's shapes; `/openapi.json` documents them.

A field of OpenAI's that this server does not support is accepted with its neutral value only, so
that nothing is silently ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from serve.http.request_body import Body, OnlyNeutral, Text

MAX_CHOICES = 16  # texts per request
MAX_SEED = 2**53 - 1  # JSON numbers are exact up to here in every library (RFC 8259, section 6)
MAX_IMAGES = 64  # per request

MAX_STOPS, MAX_STOP_LENGTH = 4, 200
STOP: JsonDict = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}

TEXT_MODEL = "A name from /v1/models; by default the served text model."
IMAGE_MODEL = "A name from /v1/models; by default the served image model."
USER = "Accepted for compatibility with OpenAI's clients; not used."
METRICS = "Metrics at the end of its training."

# ---- requests


class StreamOptions(Body):
    include_usage: bool = Field(
        default=False,
        description="Send the usage in a separate message before [DONE], as OpenAI does.",
    )
    continuous_usage_stats: bool = Field(
        default=False, description="Send the usage so far with every message."
    )


class CompletionRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "ROMEO:\n", "max_tokens": 60, "temperature": 0.7, "seed": 7}]
        }
    )

    model: Text | None = Field(default=None, description=TEXT_MODEL)
    prompt: Text = Field(
        default="", description="The text to continue; empty: start at the beginning of a text."
    )
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(
        default=0.7, ge=0, le=100, description="0 takes the most likely token each time."
    )
    top_k: int = Field(
        default=50, ge=0, description="Draw from the k most likely tokens only; 0: from all."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Draw from the most likely tokens that together have this probability.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.01,
        le=10,
        description="Above 1, makes tokens of the prompt or the text less likely (as in "
        "transformers); 1: off.",
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Makes tokens of the text less likely; 0: off."
    )
    frequency_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        description="Makes tokens of the text less likely for each occurrence; 0: off.",
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="The same seed gives the same text."
    )
    stop: Text | list[Text] = Field(
        default=[],
        description="Up to 4 strings; the text ends before the first of them.",
        json_schema_extra={
            "anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": MAX_STOPS}]
        },
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(
        default=1,
        ge=1,
        le=MAX_CHOICES,
        description="The number of texts; text i of a seed is the same for any n.",
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=5,
        description="Return each token's log probability, and those of this many of the most "
        "likely tokens.",
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        examples=[30],
        description="Give up after this many seconds; at most the server's own limit.",
    )
    user: Text | None = Field(default=None, description=USER)
    best_of: Annotated[Any, OnlyNeutral(None, 1)] = None
    echo: Annotated[Any, OnlyNeutral(None, False)] = None
    logit_bias: Annotated[Any, OnlyNeutral(None, {})] = None
    suffix: Annotated[Any, OnlyNeutral(None, "")] = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @model_validator(mode="after")
    def _check_stops(self) -> "CompletionRequest":
        if len(self.stops) > MAX_STOPS or not all(
            0 < len(stop) <= MAX_STOP_LENGTH for stop in self.stops
        ):
            raise ValueError(
                f"stop takes up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"
            )
        return self


class ImageRequest(Body):
    """The fields that all requests for images have in common."""

    model: Text | None = Field(default=None, description=IMAGE_MODEL)
    prompt: Text = Field(default="", description="The name of a class (see /v1/models), or empty.")
    label: int | Text | None = Field(
        default=None, description="A class by index or name, instead of the prompt."
    )
    truncation: float | None = Field(
        default=None,
        ge=0.05,
        le=5,
        description="Truncate the latents' normal distribution at this many standard deviations: "
        "a lower value gives more typical and less varied images. Default: no truncation.",
    )
    response_format: Literal["b64_json", "png"] = Field(
        default="b64_json",
        description="png: respond with one PNG file, with several images side by side.",
    )
    user: Text | None = Field(default=None, description=USER)


class GenerationsRequest(ImageRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "", "n": 4, "seed": 7}]})

    n: int = Field(default=1, ge=1, le=MAX_IMAGES)
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Image i of a seed is the same, alone or among others.",
    )
    size: Text | None = Field(
        default=None, description="The model's own size, such as 32x32, or left out."
    )


class InterpolationsRequest(ImageRequest):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"seed": 7, "to_seed": 8, "steps": 8}]}
    )

    seed: int = Field(ge=0, le=MAX_SEED, description="Start at the first image of this seed.")
    to_seed: int = Field(
        ge=0, le=MAX_SEED, description="End at the first image of this seed, in the same class."
    )
    steps: int = Field(
        default=8, ge=2, le=MAX_IMAGES, description="The number of images, both ends included."
    )


class GenerateRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"seed": 7}]})

    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    label: int | Text | None = Field(
        default=None, description="A class by index or name, if the model has classes."
    )


# ---- responses: completions


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """One entry per token of the choice, or in a stream per token since the last message.

    Natural logarithms of the model's own probabilities, before penalties, temperature and filters.
    """

    tokens: list[str] = Field(
        description="As text, or as bytes if a token is not made of whole characters, such as "
        "bytes:\\xe2\\x82."
    )
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(
        description="The most likely tokens and the one that was drawn."
    )
    text_offset: list[int] = Field(
        description="The token's first character, counted from the start of the choice's text."
    )


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter"] | None
    logprobs: CompletionLogprobs | None


class Completion(BaseModel):
    """A whole completion, and each message of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str = Field(
        description="Name and version of the model that generated it, such as gpt/3."
    )
    choices: list[CompletionChoice]
    usage: Usage | None


# ---- responses: images


class Image(BaseModel):
    b64_json: str = Field(description="A PNG file in base64.")
    label: str | None = Field(description="The image's class, if the model has classes.")


class Images(BaseModel):
    created: int
    data: list[Image]
    seed: int
    model: str = Field(description="Name and version of the model that generated them.")


class GenerateResponse(BaseModel):
    image_base64: str = Field(description="A PNG file in base64.")
    seed: int
    label: str | None
    model: str


# ---- responses: models and their versions


class Model(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "raykiln"
    version: int
    kind: Literal["gpt", "gan"]
    metrics: dict[str, Any] = Field(description=METRICS)
    sample: bool = Field(description="Whether its bundle has a sample: /v1/models/{id}/sample.")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelVersion(BaseModel):
    id: str
    version: int
    kind: Literal["gpt", "gan"]
    created: int
    aliases: list[str]
    metrics: dict[str, Any] = Field(description=METRICS)
    quantization: dict[str, Any] | None = Field(
        description="The graph's weight format and its loss of quality; null: float32."
    )
    run: dict[str, Any]
    dataset: dict[str, Any]
    commit: str | None
    sample: bool = Field(
        description="Whether its bundle has a sample: /v1/models/{id}/versions/{version}/sample."
    )


class ModelVersions(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelVersion] = Field(description="Newest first.")


# ---- responses: status


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: list[str] = Field(description="Name and version of each model that responded.")


class DeploymentStatus(BaseModel):
    replicas: int = Field(description="Running replicas.")
    starting: int
    target: int = Field(description="The number of replicas that autoscaling aims at.")
    status: str = Field(description="Ray Serve's status, such as HEALTHY or UPSCALING.")
    slots: int | None = Field(
        description="Requests that the replicas can process at once; null if they do not respond, "
        "or have no slots."
    )
    running: int | None
    waiting: int | None


class Percentiles(BaseModel):
    p50: float | None
    p99: float | None


class Status(BaseModel):
    deployments: dict[str, DeploymentStatus]
    latency_ms: dict[str, Percentiles] = Field(
        description="As seen by the gateway: `text_time_to_first_token` of streamed texts, `image` "
        "of whole requests for images."
    )


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody

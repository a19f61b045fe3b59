"""The HTTP interface's requests and responses, in OpenAI's shapes: what `/openapi.json` documents.

A field that OpenAI knows and this house doesn't may be sent at its neutral value only: nothing is silently ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import CoreSchema, core_schema

MAX_CHOICES = 16  # texts of one request
MAX_SEED = 2**53 - 1  # what every JSON library holds exactly, a browser's too (RFC 8259, section 6)
MAX_PICTURES = 64  # of a request

MAX_STOPS, MAX_STOP_LENGTH = 4, 200
STOP: JsonDict = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}


def _encodable(value: Any) -> Any:
    """Refuses half a surrogate pair: JSON can spell it, no tokenizer and no reply can hold it."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half a surrogate pair, which is no Unicode text") from error
    return value


Text = Annotated[str, AfterValidator(_encodable)]


class _neutral:  # used as an annotation, like pydantic's own
    """Lets the field be one of these values only."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.values)}

    def _check(self, value: Any) -> Any:
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in self.values
        ):
            raise ValueError("is not supported by this server: leave it out")
        return value


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    """A field's JSON schema, with null as one more of its types."""
    about = {
        key: field[key] for key in ("title", "description", "default", "examples") if key in field
    }
    types = field.get("anyOf") or [{key: value for key, value in field.items() if key not in about}]
    null = {"type": "null"}
    return about | {
        "anyOf": types if null in types or None in types[0].get("enum", []) else [*types, null]
    }


class Body(BaseModel):
    """A JSON body: unknown fields and wrong types are errors; null means the default; 10.0 is the integer 10, as in JSON Schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {
            name: value
            for name, value in data.items()
            if value is not None or name not in cls.model_fields
        }
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in given.items()
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Says that each field with a default may be null."""
        described = handler.resolve_ref_schema(handler(schema))
        described["properties"] = {
            name: _nullable(field) if "default" in field else field
            for name, field in described["properties"].items()
        }
        return described


class StreamOptions(Body):
    include_usage: bool = Field(
        default=False,
        description="Send the usage in a message of its own before [DONE], as OpenAI does.",
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

    model: Text | None = Field(
        default=None, description="A name of /v1/models; by default the text model that is served."
    )
    prompt: Text = Field(
        default="", description="What to continue; empty: the beginning of a text."
    )
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(
        default=0.7, ge=0, le=100, description="0 takes the likeliest token each time."
    )
    top_k: int = Field(
        default=50, ge=0, description="Draw from the k likeliest tokens only; 0: from all."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Draw from the likeliest tokens that together have this probability.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.01,
        le=10,
        description="Above 1, what stands in prompt or text becomes less likely (as in transformers); 1: off.",
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Makes what stands in the text less likely; 0: off."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="The same, by how often it stands there; 0: off."
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
        description="Texts to write: of a seed, text i is the same whatever n.",
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=5,
        description="Tell each token's logarithm of probability, and those of so many of the likeliest tokens.",
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        examples=[30],
        description="Give up after so many seconds; the server's own limit is the most.",
    )
    user: Text | None = Field(default=None, description="Accepted for OpenAI's clients; not used.")
    best_of: Annotated[Any, _neutral(None, 1)] = None
    echo: Annotated[Any, _neutral(None, False)] = None
    logit_bias: Annotated[Any, _neutral(None, {})] = None
    suffix: Annotated[Any, _neutral(None, "")] = None

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


class PictureRequest(Body):
    """What every request for pictures may say."""

    model: Text | None = Field(
        default=None,
        description="A name of /v1/models; by default the picture model that is served.",
    )
    prompt: Text = Field(default="", description="The name of a class (see /v1/models), or empty.")
    label: int | Text | None = Field(
        default=None, description="A class by index or name: the same as its name as the prompt."
    )
    truncation: float | None = Field(
        default=None,
        ge=0.05,
        le=5,
        description="Cuts the latents' normal distribution off at so many standard deviations: the lower, the more typical and the "
        "less varied the pictures. Left out: not at all.",
    )
    response_format: Literal["b64_json", "png"] = Field(
        default="b64_json",
        description="png: the answer is one PNG file, of several pictures side by side.",
    )
    user: Text | None = Field(default=None, description="Accepted for OpenAI's clients; not used.")


class ImagesRequest(PictureRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "", "n": 4, "seed": 7}]})

    n: int = Field(default=1, ge=1, le=MAX_PICTURES)
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Picture i of a seed is the same, alone or among many.",
    )
    size: Text | None = Field(
        default=None, description="The model's own, such as 32x32, or left out."
    )


class InterpolationsRequest(PictureRequest):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"seed": 7, "to_seed": 8, "steps": 8}]}
    )

    seed: int = Field(
        ge=0, le=MAX_SEED, description="The way begins at the first picture of this seed."
    )
    to_seed: int = Field(
        ge=0,
        le=MAX_SEED,
        description="And ends at the first picture of this one, in the same class.",
    )
    steps: int = Field(
        default=8, ge=2, le=MAX_PICTURES, description="Pictures, both ends included."
    )


class GenerateRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"seed": 7}]})

    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    label: int | Text | None = Field(
        default=None, description="A class by index or name, where the model has classes."
    )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """One entry of each token of the choice, and in a stream of each since the last message; they are natural logarithms.

    The probabilities are the model's own, before penalties, temperature and filters.
    """

    tokens: list[str] = Field(
        description="As text; a token that is no whole character as its bytes, such as bytes:\\xe2\\x82."
    )
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(
        description="The likeliest tokens and the one that was taken."
    )
    text_offset: list[int] = Field(
        description="Where the token begins, in characters of the choice's whole text."
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
        description="Name and version of the model that answered, such as gpt/3."
    )
    choices: list[CompletionChoice]
    usage: Usage | None


class Picture(BaseModel):
    b64_json: str = Field(description="A PNG file in base64.")
    label: str | None = Field(description="The picture's class, where the model has classes.")


class Images(BaseModel):
    created: int
    data: list[Picture]
    seed: int
    model: str = Field(description="Name and version of the model that answered.")


class Generated(BaseModel):
    image_base64: str = Field(description="A PNG file in base64.")
    seed: int
    label: str | None
    model: str


class Model(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "raykiln"
    version: int
    kind: Literal["gpt", "gan"]
    metrics: dict[str, Any] = Field(description="What was measured at the end of its training.")
    sample: bool = Field(
        description="Whether its bundle holds something that it made: /v1/models/{id}/sample."
    )


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelVersion(BaseModel):
    id: str
    version: int
    kind: Literal["gpt", "gan"]
    created: int
    aliases: list[str]
    metrics: dict[str, Any] = Field(description="What was measured at the end of its training.")
    quantization: dict[str, Any] | None = Field(
        description="The graph's weights and what they cost; null: float32."
    )
    run: dict[str, Any]
    dataset: dict[str, Any]
    commit: str | None
    sample: bool = Field(
        description="Whether its bundle holds something that it made: /v1/models/{id}/versions/{version}/sample."
    )


class ModelVersions(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelVersion] = Field(description="Newest first.")


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: list[str] = Field(description="Name and version of each model that answered.")


class DeploymentStatus(BaseModel):
    replicas: int = Field(description="That serve now.")
    starting: int
    target: int = Field(description="What autoscaling wants.")
    status: str = Field(description="Serve's word for it, such as HEALTHY or UPSCALING.")
    slots: int | None = Field(
        description="Requests that the replicas can work on at once; null where they do not answer, or have none."
    )
    running: int | None
    waiting: int | None


class Percentiles(BaseModel):
    p50: float | None
    p99: float | None


class Status(BaseModel):
    deployments: dict[str, DeploymentStatus]
    latency_ms: dict[str, Percentiles] = Field(
        description="As the gateway saw it: `text_first_token` of streamed texts, `picture` of whole requests."
    )


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody

"""How JSON bodies are validated: the base class of all requests, and the types of their fields."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema


def _encodable(value: str) -> str:
    """Refuse half a surrogate pair: JSON can express it, but tokenizers and responses cannot."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "contains half a surrogate pair, which is not valid Unicode text"
            ) from error
    return value


Text = Annotated[str, AfterValidator(_encodable)]


class OnlyNeutral:
    """An annotation for fields of OpenAI's that are not supported: allows their neutral values."""

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

    def _check(self, value: object) -> object:
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in self.values
        ):
            raise ValueError("is not supported by this server: leave it out")
        return value


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    """Add null to the types of a field's JSON schema."""
    about = {
        key: field[key] for key in ("title", "description", "default", "examples") if key in field
    }
    types = field.get("anyOf") or [{key: value for key, value in field.items() if key not in about}]
    null = {"type": "null"}
    is_nullable = null in types or None in types[0].get("enum", [])
    return about | {"anyOf": types if is_nullable else [*types, null]}


class Body(BaseModel):
    """A JSON body.

    Unknown fields and wrong types are errors. null means the default, and 10.0 is the integer 10,
    as in JSON Schema.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, data: Any) -> Any:
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
        """Declare every field with a default nullable."""
        described = handler.resolve_ref_schema(handler(schema))
        described["properties"] = {
            name: _nullable(field) if "default" in field else field
            for name, field in described["properties"].items()
        }
        return described

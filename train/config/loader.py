"""Load a config: defaults < preset or YAML file < command line, the same dotted keys everywhere.

python -m train gpt --config gpt-tiny --optim.lr 1e-3 --dry-run
"""

import argparse
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from cluster.cli import Parser, nearest
from train.config.sections import Config, Values
from train.kinds import KINDS

PRESETS = Path(__file__).parent.parent / "presets"

# Options of other libraries that would give wrong results without an error, and why.
REFUSED = {
    "parallel.static_graph": "DDP would plan the exchange of gradients in the first step and then, "
    "without an error, leave out gradients of a critic whose penalty is differentiated twice",
}

AnyConfig = TypeVar("AnyConfig", bound=Config)


# ---- values


def load(kind: str, config: str | None = None, overrides: Values | None = None) -> Config:
    """Return the config of a run: defaults < `config` < `overrides`.

    Args:
        kind: a name in `train.kinds.KINDS`.
        config: a preset's name or a YAML file.
        overrides: values by dotted or nested keys.

    Raises:
        ValueError: a value or key is invalid; names it and where it came from.
    """
    values, where = read(kind, config)
    if overrides:
        where += " with the command line's values"
    return build(KINDS[kind].config, merge(values, nested(overrides or {})), where)


def read(kind: str, config: str | None) -> tuple[Values, str]:
    """Return the values of a preset or YAML file, and where they came from.

    Raises:
        ValueError: there is no such file, it is invalid, or it is of another kind of run.
    """
    if config is None:
        return {}, f"{kind} defaults"
    path = PRESETS / f"{config}.yaml"
    if not path.is_file():
        path = Path(config)
    if not path.is_file():
        presets = [file.stem for file in sorted(PRESETS.glob(f"{kind}-*.yaml"))]
        hint = nearest(config, presets) or f"; presets: {', '.join(presets)}"
        raise ValueError(f"--config {config} is neither a preset nor a file{hint}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: expected keys and values")
    if (other := values.pop("kind", kind)) != kind:
        raise ValueError(
            f"{path} is the config of another kind of run: use `python -m train {other}`"
        )
    return values, str(path)


def build(model: type[AnyConfig], values: Values, where: str) -> AnyConfig:
    """Return the validated config.

    Args:
        model: of the config.
        values: nested.
        where: they came from, for error messages.

    Raises:
        ValueError: a key or value is invalid; names the first one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if not _is_union_branch(part))
        if problem["type"] == "extra_forbidden":
            message = _unknown("key", key, keys(model))
        elif problem["type"] == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
        else:
            message = f"{key} is {problem['input']!r}: {problem['msg']}"
        raise ValueError(f"{where}: {message}") from None


def merge(below: Values, above: Values) -> Values:
    """Merge nested values; those of `above` win."""
    merged = dict(below)
    for key, value in above.items():
        both_nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_nested else value
    return merged


def nested(dotted: Values) -> Values:
    """Turn {"optim.lr": 1} into {"optim": {"lr": 1}}."""
    values: Values = {}
    for key, value in dotted.items():
        *sections, leaf = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return values


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of a config, e.g. ["run.name", ..., "optim.lr", ...]."""
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _unknown(what: str, key: str, valid: list[str]) -> str:
    name = key.removeprefix("--")
    if name in REFUSED:
        return f"{what} {key} is refused: {REFUSED[name]}"
    return f"there is no {what} {key}{nearest(name, valid)}"


def _is_union_branch(part: int | str) -> bool:
    """Whether pydantic added a union's branch to a location (`critic_lr.constrained-float`)."""
    return isinstance(part, str) and (
        "[" in part or part in {"str", "float", "int"} or part.startswith("constrained")
    )


# ---- the command line


class KeyOptions:
    """A config's keys as options of a command: `--optim.lr 3e-4`.

    Args:
        parser: gets an option per key.
        kind: a name in `train.kinds.KINDS`.
    """

    def __init__(self, parser: argparse.ArgumentParser, kind: str) -> None:
        model = KINDS[kind].config
        # A whole section can be given as JSON: --optim '{"lr": 3e-4}'.
        self._keys = [*keys(model), *model.model_fields]
        self._others = [name.removeprefix("--") for name in parser._option_string_actions]
        command_line: type[BaseSettings] = type("CommandLine", (BaseSettings, model), {})
        self._source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
            command_line,
            root_parser=parser,
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_parse_none_str="null",
            cli_use_class_docs_for_groups=True,
        )
        parser.usage = "%(prog)s [options] [--KEY VALUE]..."  # all keys would fill a screen
        defaults = model().model_dump()
        for action in parser._actions:
            if action.dest in keys(model):
                action.help = _with_default(action.help or "", _value(defaults, action.dest))

    def check(self, arguments: list[str]) -> None:
        """Check the names of options.

        Raises:
            ValueError: one is unknown; names the nearest.
        """
        known = [*self._keys, *self._others]
        for argument in arguments:
            option = argument.split("=", 1)[0]
            if option.startswith("--") and option.removeprefix("--") not in known:
                raise ValueError(_unknown("option", option, known))

    def values(self, arguments: argparse.Namespace) -> Values:
        """Return the nested values of the keys that were given.

        Raises:
            ValueError: a value cannot be parsed.
        """
        given = {name: value for name, value in vars(arguments).items() if name in self._keys}
        try:
            return self._source(parsed_args=given)()
        except SettingsError as error:
            raise ValueError(str(error).removeprefix("error parsing CLI: ")) from None


def _value(values: Values, key: str) -> object:
    """Return the value of a dotted key."""
    value: Any = values
    for part in key.split("."):
        value = value[part]
    return value


def _with_default(text: str, default: object) -> str:
    """Replace the default at the end of a help text, Python's repr, by what one would type."""
    text = text.rpartition("(default: ")[0].strip()
    if default is None:
        return text
    typed = default if isinstance(default, str) and default.strip() else json.dumps(default)
    return f"{text} (default: {typed})".strip()


def parse(kind: str, arguments: list[str]) -> Values:
    """Return the nested values of a command line that consists of keys alone.

    Raises:
        ValueError: a key is unknown, or a value is missing.
    """
    parser = Parser(prog=f"python -m train {kind}", allow_abbrev=False)
    options = KeyOptions(parser, kind)
    options.check(arguments)
    return options.values(parser.parse_args(arguments))

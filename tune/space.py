"""A search space: dotted config keys, each with the distribution that its values are drawn from.

    optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
    optim.warmup_steps: {randint: [0, 200]}
    gan.critic_steps: {choice: [2, 5]}

loguniform and uniform draw floats between two bounds, randint whole numbers (the upper bound excluded, as in NumPy),
choice one of a list; grid tries every entry of its list. All of it is checked against the config before anything starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
import yaml

from train.config import loader as configs
from train.kinds import KINDS

SPACES = Path(__file__).parent / "spaces"
DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "loguniform": ray.tune.loguniform,
    "uniform": ray.tune.uniform,
    "randint": ray.tune.randint,
    "choice": ray.tune.choice,
    "grid": ray.tune.grid_search,
}
LISTS = {"choice", "grid"}
# What the search itself decides: names and rungs of trials, and how many fit beside each other.
RESERVED = ("run.name", "run.resume", "steps", "parallel.", "log.eval_every")
JUDGED_BY = {
    "gpt": (),
    "gan": ("data.", "quality."),
}  # a GAN's figures are of one data set, its extractor and a number of pictures


@dataclass(frozen=True)
class Distribution:
    """What one key's values are drawn from: `name` with two bounds, or with a list's entries."""

    name: str
    values: tuple[Any, ...]

    def domain(self) -> Any:
        """As Ray Tune takes it."""
        function = DISTRIBUTIONS[self.name]
        return function(list(self.values)) if self.name in LISTS else function(*self.values)

    def extremes(self) -> tuple[Any, ...]:
        """Values that are valid only if every value that can be drawn is."""
        return (self.values[0], self.values[1] - 1) if self.name == "randint" else self.values


Space = dict[str, Distribution]


def read(name: str) -> Space:
    """The space of a shipped name (`gpt`, `gan`) or a YAML file.

    Raises:
        ValueError: no such space, or an entry that is no distribution.
    """
    path = SPACES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SPACES.glob("*.yaml")))
        raise ValueError(f"--space {name}: neither a shipped space ({shipped}) nor a file")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"{path} names no keys to search: write lines like `optim.lr: {{loguniform: [1.0e-4, 1.0e-2]}}`"
        )
    return {key: _distribution(entry, f"{path}: {key}") for key, entry in entries.items()}


def check(space: Space, kind: str, base: dict[str, Any]) -> None:
    """Refuses a space that could draw a value which the config does not take.

    Args:
        kind: gpt or gan.
        base: the nested values that the drawn ones are put into.

    Raises:
        ValueError: an unknown key (with the nearest valid one), a key that the search decides, or a value out of range.
    """
    model = KINDS[kind].config
    valid = configs.keys(model)
    for key, distribution in space.items():
        if key not in valid:
            raise ValueError(f"search space: there is no key {key}{configs.nearest(key, valid)}")
        if key.startswith(RESERVED):
            raise ValueError(
                f"search space: {key} says how trials run and is the same for all: give it as --{key}, not in the space"
            )
        if key.startswith(JUDGED_BY[kind]):
            raise ValueError(
                f"search space: {key} changes what trials are judged by, so they could not be compared: give it as --{key}"
            )
        for value in distribution.extremes():
            configs.build(
                model, configs.merge(base, configs.nested({key: value})), f"search space, {key}"
            )


def domains(space: Space) -> dict[str, Any]:
    """The space as Ray Tune's `param_space`."""
    return {key: distribution.domain() for key, distribution in space.items()}


def size(space: Space, num_samples: int) -> int:
    """The number of trials: every combination of the grids, `num_samples` times."""
    trials = num_samples
    for distribution in space.values():
        trials *= len(distribution.values) if distribution.name == "grid" else 1
    return trials


def _distribution(entry: Any, where: str) -> Distribution:
    if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in DISTRIBUTIONS:
        raise ValueError(
            f"{where} is {entry!r}: write one of {', '.join(DISTRIBUTIONS)} with its values, as in {{uniform: [0, 1]}}"
        )
    [(name, values)] = entry.items()
    if not isinstance(values, list) or not values or (name not in LISTS and len(values) != 2):
        raise ValueError(
            f"{where}: {name} takes {'a list of values' if name in LISTS else 'two bounds'}, not {values!r}"
        )
    if name not in LISTS:
        _check_bounds(name, values, where)
    return Distribution(name, tuple(values))


def _check_bounds(name: str, bounds: list[Any], where: str) -> None:
    kinds = int if name == "randint" else (int, float)
    for bound in bounds:
        if isinstance(bound, str):
            raise ValueError(
                f"{where}: {bound!r} is text to YAML: write numbers as 1.0e-4, with a point"
            )
        if not isinstance(bound, kinds) or isinstance(bound, bool):
            raise ValueError(
                f"{where}: {name} takes {'whole ' if name == 'randint' else ''}numbers, not {bound!r}"
            )
    low, high = bounds
    if not low < high:
        raise ValueError(
            f"{where}: the bounds {low} and {high} leave nothing between them: the lower one comes first"
        )
    if name == "loguniform" and low <= 0:
        raise ValueError(f"{where}: loguniform's lower bound is {low}: it must be above 0")

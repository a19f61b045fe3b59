"""A search space: dotted config keys, each with the distribution that its values are drawn from.

    optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
    optim.warmup_steps: {randint: [0, 200]}
    gan.critic_steps: {choice: [2, 5]}

loguniform and uniform draw floats between two bounds, randint integers (without the upper bound,
as in NumPy), choice an entry of a list; grid tries every entry of a list. The whole space is
checked against the config before a search starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
import yaml
from ray.tune.search.sample import Domain

from cluster import cli
from train.config import loader as configs
from train.config.sections import Values
from train.kinds import KINDS

SPACES = Path(__file__).parent / "spaces"

TuneDomain = Domain | dict[str, Any]  # {"grid_search": [...]} for a grid
DISTRIBUTIONS: dict[str, Callable[..., TuneDomain]] = {
    "loguniform": ray.tune.loguniform,
    "uniform": ray.tune.uniform,
    "randint": ray.tune.randint,
    "choice": ray.tune.choice,
    "grid": ray.tune.grid_search,
}
LISTS = {"choice", "grid"}
OWN = ("run.name", "log.eval_every")  # set by the search for each trial
SHARED = ("run.resume", "steps", "parallel.")  # the same for all trials


@dataclass(frozen=True)
class Distribution:
    """The distribution of one key's values.

    Attributes:
        name: one of `DISTRIBUTIONS`.
        values: two bounds, or the entries of a list (choice, grid).
    """

    name: str
    values: tuple[Any, ...]

    def domain(self) -> TuneDomain:
        """Return the distribution as Ray Tune's object."""
        function = DISTRIBUTIONS[self.name]
        return function(list(self.values)) if self.name in LISTS else function(*self.values)

    def extremes(self) -> tuple[Any, ...]:
        """Return values whose validity implies that every value that can be drawn is valid."""
        return (self.values[0], self.values[1] - 1) if self.name == "randint" else self.values


Space = dict[str, Distribution]


def read(name: str) -> Space:
    """Return the space of a shipped name (`gpt`, `gan`) or a YAML file.

    Raises:
        ValueError: there is no such space, or an entry is not a distribution.
    """
    path = SPACES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SPACES.glob("*.yaml")))
        raise ValueError(f"--space {name} is neither a shipped space ({shipped}) nor a file")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"{path} has no keys to search: write lines such as "
            "`optim.lr: {loguniform: [1.0e-4, 1.0e-2]}`"
        )
    return {key: _distribution(entry, f"{path}: {key}") for key, entry in entries.items()}


def check(space: Space, kind: str, base: Values) -> None:
    """Check that every value the space can draw gives a valid config.

    Args:
        space: the search space.
        kind: gpt or gan.
        base: the nested config values that drawn ones are merged into.

    Raises:
        ValueError: a key is unknown (names the nearest), must be the same for all trials, or a
            value is out of range.
    """
    model = KINDS[kind].config
    valid = configs.keys(model)
    for key, distribution in space.items():
        if key not in valid:
            raise ValueError(f"search space: there is no key {key}{cli.nearest(key, valid)}")
        if key in OWN:
            raise ValueError(
                f"search space: {key} is set by the search for each trial: leave it out"
            )
        if key.startswith(SHARED):
            raise ValueError(
                f"search space: {key} must be the same for all trials: give it as --{key}, not in "
                "the space"
            )
        if key.startswith(model.evaluation_keys):
            raise ValueError(
                f"search space: {key} changes how trials are evaluated, so they could not be "
                f"compared: give it as --{key}, not in the space"
            )
        for value in distribution.extremes():
            values = configs.merge(base, configs.nested({key: value}))
            configs.build(model, values, f"search space, {key}")


def domains(space: Space) -> dict[str, TuneDomain]:
    """Return the space as Ray Tune's `param_space`."""
    return {key: distribution.domain() for key, distribution in space.items()}


def size(space: Space, num_samples: int) -> int:
    """Return the number of trials: every combination of the grids, `num_samples` times."""
    trials = num_samples
    for distribution in space.values():
        trials *= len(distribution.values) if distribution.name == "grid" else 1
    return trials


def _distribution(entry: object, where: str) -> Distribution:
    """Return the distribution that an entry of a space's file describes."""
    if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in DISTRIBUTIONS:
        raise ValueError(
            f"{where} is {entry!r}: write one of {', '.join(DISTRIBUTIONS)} with its values, "
            "as in {uniform: [0, 1]}"
        )
    [(name, values)] = entry.items()
    if not isinstance(values, list) or not values or (name not in LISTS and len(values) != 2):
        expected = "a list of values" if name in LISTS else "two bounds"
        raise ValueError(f"{where}: {name} takes {expected}, not {values!r}")
    if name not in LISTS:
        _check_bounds(name, values, where)
    return Distribution(name, tuple(values))


def _check_bounds(name: str, bounds: list[Any], where: str) -> None:
    types, expected = (int, "integers") if name == "randint" else ((int, float), "numbers")
    for bound in bounds:
        if isinstance(bound, str):
            raise ValueError(
                f"{where}: {bound!r} is a string in YAML: write numbers with a decimal point, "
                "as in 1.0e-4"
            )
        if not isinstance(bound, types) or isinstance(bound, bool):
            raise ValueError(f"{where}: {name} takes {expected}, not {bound!r}")
    low, high = bounds
    if not low < high:
        raise ValueError(
            f"{where}: the bounds are {low} and {high}: the first must be less than the second"
        )
    if name == "loguniform" and low <= 0:
        raise ValueError(f"{where}: loguniform's lower bound is {low}: it must be above 0")

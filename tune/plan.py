"""A search's plan: the config that trials share, the space they draw from, and their rungs."""

from dataclasses import dataclass

from train.config import loader as configs
from train.config.sections import Config, Values
from train.kinds import KINDS
from tune import space as spaces

# Evaluations of a trial that runs to its end. After the first, second and fourth of them the
# scheduler stops the worse half.
EVALUATIONS = 8


@dataclass(frozen=True)
class Plan:
    """What a search does. Validated when it is made.

    Attributes:
        kind: gpt or gan.
        base: the nested config values that every trial starts from, as given.
        space: the search space.
        num_samples: draws for each combination of the space's grids.
        name: the search's folder below searches/; its trials are the runs <name>-00000, ...
        max_concurrent: trials at once; by default as many as the cluster's nodes hold.

    Raises:
        ValueError: a number is too small, or the space could draw an invalid config.
    """

    kind: str
    base: Values
    space: spaces.Space
    num_samples: int
    name: str
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"--num-samples is {self.num_samples}: use at least 1")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ValueError(f"--max-concurrent is {self.max_concurrent}: use at least 1")
        if self.steps < 2:
            raise ValueError(
                f"steps is {self.steps}: a search needs at least 2, so that trials are compared "
                "before their last step"
            )
        self.trial_config(f"{self.name}-00000", {})
        spaces.check(self.space, self.kind, self.base)

    def config(self, values: Values | None = None) -> Config:
        """Return the base config, with `values` (by dotted key) drawn from the space."""
        return self._build(configs.merge(self.base, configs.nested(values or {})))

    def trial_config(self, run: str, values: Values) -> Config:
        """Return the config of a trial: with its run's name, evaluated at each rung."""
        own = {**values, "run.name": run, "log.eval_every": self.rung}
        return self._build(configs.merge(self.base, configs.nested(own)))

    def _build(self, values: Values) -> Config:
        return configs.build(KINDS[self.kind].config, values, f"search {self.name}")

    @property
    def steps(self) -> int:
        """Steps of a trial that is not stopped early."""
        return self.config().steps

    @property
    def rung(self) -> int:
        """Steps between a trial's evaluations."""
        return max(1, self.steps // EVALUATIONS)

    @property
    def metric(self) -> str:
        """The metric that trials are compared by; smaller is better."""
        return KINDS[self.kind].best_metric

    @property
    def num_trials(self) -> int:
        """Every combination of the grids, `num_samples` times."""
        return spaces.size(self.space, self.num_samples)

    def record(self) -> dict[str, object]:
        """Return, as JSON, what must be the same when a search is resumed."""
        space = {
            key: {distribution.name: list(distribution.values)}
            for key, distribution in self.space.items()
        }
        return {
            "kind": self.kind,
            "config": self.config().model_dump(mode="json"),
            "space": space,
            "num_samples": self.num_samples,
        }

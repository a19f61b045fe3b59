"""Where a test or `verify-resume` plugs into a run."""

from typing import TypeVar

from train.config.sections import Config
from train.parallel.state import State

AnyConfig = TypeVar("AnyConfig", bound=Config)


class Hooks:
    """Called by a run's workers; these do nothing. Must be picklable."""

    def on_worker(self, run_uri: str, rank: int) -> "Hooks":
        """Return the hooks of one worker; called once when its process starts."""
        return self

    def restored(self, config: AnyConfig, state: State) -> tuple[AnyConfig, State]:
        """Called with the config and the state of the checkpoint to resume from; returns both."""
        return config, state

    def gradients_ready(self, step: int) -> None:
        """Called in `step` before the (last) optimizer's update; GAN: the critic is updated, the
        generator is not."""

    def files_uploaded(self, step: int) -> None:
        """Called in the checkpoint of `step` when its files are on storage and its manifest is
        not."""

"""What a report plots: panels of metrics over steps."""

from dataclasses import dataclass
from enum import Enum, auto


class Scale(Enum):
    """The y axis of a panel."""

    LINEAR = auto()
    FIT = auto()
    """Linear; symmetric-logarithmic where a few peaks would flatten the rest."""
    LOG = auto()
    """Logarithmic where all values are positive, else as FIT."""


@dataclass(frozen=True)
class Panel:
    """One plot. It is drawn where a run recorded one of its metrics."""

    title: str
    metrics: tuple[str, ...]
    scale: Scale = Scale.LINEAR

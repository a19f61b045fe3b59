"""The options of `python -m train verify-resume`; this module imports neither torch nor Ray."""

import argparse

from train.kinds import KINDS

STEPS = 24
GPU_TOLERANCE = 1e-3  # CUDA does not fix the order of a summation
KILLS = ("upload", "worker", "driver", "random")
BROKEN_RESTORES = ("optimizer", "order", "weights")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `verify-resume` but --storage."""
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--config", help="a preset, or a YAML file with the same keys")
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="steps of each run, with four checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--kills",
        default=",".join(KILLS),
        help=f"kills to inject, any of {', '.join(KILLS)}, each any number of times "
        "(default: each once)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random kills (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest relative difference allowed (default: 0, which is bit for bit; "
        f"{GPU_TOLERANCE:g} on GPUs)",
    )
    parser.add_argument("--keep", action="store_true", help="keep both runs where they are equal")
    parser.add_argument(
        "--break-restore",
        choices=BROKEN_RESTORES,
        help="break the resume on purpose, to see that the difference is found",
    )

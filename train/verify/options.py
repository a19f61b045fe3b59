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
        help="of each run, with four checkpoints (default %(default)s)",
    )
    parser.add_argument(
        "--kills",
        default=",".join(KILLS),
        help=f"which, in any number: {', '.join(KILLS)} (default: each once)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"relative (default 0, bit for bit; {GPU_TOLERANCE:g} on GPUs)",
    )
    parser.add_argument("--keep", action="store_true", help="keep both runs where they are equal")
    parser.add_argument(
        "--break-restore",
        choices=BROKEN_RESTORES,
        help="break the resume on purpose, to see that the difference is found",
    )

"""Compare an exported graph's outputs with torch's before anything is published."""

from models.bundle import Parity, ParityCase

VERSIONS = "check the versions of torch, onnxscript and onnxruntime against requirements.lock"


def check_parity(
    differences: dict[str, float], tolerance: float, what: str, hint: str = VERSIONS
) -> Parity:
    """Return a manifest's `parity`.

    Args:
        differences: the largest absolute difference from torch, by case.
        tolerance: the largest that is allowed.
        what: was compared, e.g. "logits".
        hint: what to do where they differ.

    Raises:
        ValueError: a difference is above the tolerance, or not a number.
    """
    # NaN counts as the largest; compared with `<` it would be neither larger nor smaller.
    worst = max(
        differences, key=lambda case: (differences[case] != differences[case], differences[case])
    )
    if not differences[worst] <= tolerance:
        raise ValueError(
            f"the exported graph's {what} differ from torch's by {differences[worst]:.2g} "
            f"({worst}), and {tolerance:.2g} is allowed: nothing is published; {hint}"
        )
    cases: list[ParityCase] = [
        {"name": case, "max_abs_diff": value} for case, value in differences.items()
    ]
    return {"max_abs_diff": differences[worst], "tolerance": tolerance, "cases": cases}

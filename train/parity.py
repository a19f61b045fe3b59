"""Does an exported graph answer as the model does? Measured before anything is published, and kept in the manifest."""

from typing import Any

VERSIONS = "check the versions of torch, onnxscript and onnxruntime against requirements.lock"


def judge(
    differences: dict[str, float], tolerance: float, what: str, way_out: str = VERSIONS
) -> dict[str, Any]:
    """A manifest's `parity`.

    Args:
        differences: the largest absolute difference from torch, by case.
        tolerance: the largest that is allowed.
        what: was compared, e.g. "logits".
        way_out: what to do where they differ.

    Raises:
        ValueError: a difference is above the tolerance, or not a number.
    """
    # NaN counts as the worst: it compares as neither larger nor smaller.
    worst = max(
        differences, key=lambda case: (differences[case] != differences[case], differences[case])
    )
    if not differences[worst] <= tolerance:
        raise ValueError(
            f"the exported graph's {what} are {differences[worst]:.2g} from torch's own ({worst}), where {tolerance:.2g} is allowed: "
            f"nothing is published; {way_out}"
        )
    cases = [{"name": case, "max_abs_diff": difference} for case, difference in differences.items()]
    return {"max_abs_diff": differences[worst], "tolerance": tolerance, "cases": cases}

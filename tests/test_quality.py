"""The sliced Wasserstein distance against values worked out by hand, and what it says of real pictures, noise and copies."""

from pathlib import Path

import numpy as np
import pytest
import torch

from train import quality
from train.config import ImageData
from train.images import Pictures, prepare


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pictures]:
    dataset = prepare(ImageData(), str(tmp_path_factory.mktemp("kiln")))
    return {split: Pictures(Path(dataset), split, 32) for split in ("train", "heldout")}


def test_distance_by_hand() -> None:
    """Sorted, the first direction's points are 0, 1, 5 and 1, 2, 3: (1 + 1 + 2) / 3; the second's are equal."""
    first = torch.tensor([[5.0, 1.0], [0.0, 2.0], [1.0, 3.0]])
    second = torch.tensor([[1.0, 3.0], [3.0, 1.0], [2.0, 2.0]])
    assert quality.sliced_wasserstein(first, second) == pytest.approx(4 / 3 / 2)
    assert quality.sliced_wasserstein(first, first[[2, 0, 1]]) == 0


def test_clouds_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="equal size"):
        quality.sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))


def test_a_shift_costs_its_mean_projection() -> None:
    """All pictures shifted by v: each direction d costs |v . d|, whose mean is |v| sqrt(2 / (pi D)) for random directions."""
    torch.manual_seed(0)
    pictures = torch.randn(50, 1, 16, 16)
    shifted = quality.project([pictures + 0.5])
    expected = 0.5 * 16 * np.sqrt(2 / (np.pi * 256))
    assert quality.sliced_wasserstein(quality.project([pictures]), shifted) == pytest.approx(expected, rel=0.1)


def test_batches_do_not_matter_and_directions_are_always_the_same() -> None:
    pictures = torch.rand(10, 3, 8, 8)
    whole, parts = quality.project([pictures]), quality.project(pictures.split(3))
    assert whole.shape == (10, quality.NUM_DIRECTIONS)
    assert torch.allclose(whole, parts, atol=1e-6)


def test_verdicts_on_real_pictures(garments: dict[str, Pictures]) -> None:
    """Real pictures are at the floor; noise, one class, 20 pictures repeated and mere means are told apart from them."""
    train, heldout = garments["train"], garments["heldout"]
    draw = np.random.default_rng(0)
    ankle_boots = np.flatnonzero(train.labels == 9)
    mean = torch.from_numpy(train.centred(slice(0, 2000)).mean(axis=0))

    def judged(generate):  # type: ignore[no-untyped-def]
        figures = quality.judge(generate, train, heldout)
        assert figures["heldout_samples"] == 1000
        return figures["heldout_sliced_wasserstein"] / figures["heldout_sliced_wasserstein_floor"]

    assert judged(lambda part: torch.from_numpy(train.centred(draw.integers(len(train), size=len(part))))) < 1.5
    assert judged(lambda part: torch.from_numpy(draw.uniform(-1, 1, (len(part), 1, 32, 32)).astype(np.float32))) > 5
    assert judged(lambda part: torch.from_numpy(train.centred(draw.choice(ankle_boots, len(part))))) > 3
    assert judged(lambda part: torch.from_numpy(train.centred(np.arange(len(part)) % 20))) > 2
    assert judged(lambda part: mean.expand(len(part), -1, -1, -1)) > 5


def test_the_floor_is_the_same_in_every_run(garments: dict[str, Pictures]) -> None:
    figures = [quality.judge(lambda part: torch.zeros(len(part), 1, 32, 32), garments["train"], garments["heldout"]) for _ in range(2)]
    assert figures[0] == figures[1]


def test_pictures_are_drawn_from_all_classes(garments: dict[str, Pictures], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's pictures lie class by class: the first ones would be of one class."""
    monkeypatch.setattr(quality, "MAX_SAMPLES", 200)
    seen: list[int] = []

    def generate(part: np.ndarray) -> torch.Tensor:
        seen.extend(part.tolist())
        return torch.from_numpy(garments["train"].centred(part))

    figures = quality.judge(generate, garments["train"], garments["heldout"])
    assert figures["heldout_sliced_wasserstein"] == figures["heldout_sliced_wasserstein_floor"], "the floor's own pictures are at the floor"
    assert len(set(seen)) == 200
    assert max(seen) > 8000

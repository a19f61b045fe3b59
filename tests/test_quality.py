"""The figures against torchmetrics, torch-fidelity and the papers' formulas, and what they say of real pictures, copies and noise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from models.nets.features import Extractor
from train.config.data import ImageData
from train.data.images import Images, prepare
from train.data.shipped.files import shipped
from train.gan import quality
from train.gan.alarms import Alarms
from train.gan.extractor import unpack
from train.gan.quality import Evaluator

Generate = Callable[[np.ndarray], Tensor]


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Images]:
    dataset = prepare(ImageData(), str(tmp_path_factory.mktemp("kiln")))
    return {split: Images(Path(dataset), split, 32) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return unpack(shipped("fashion-mnist-extractor.safetensors").read_bytes(), "shipped")[0]


@pytest.fixture(scope="module")
def judge(garments: dict[str, Images], extractor: Extractor) -> Evaluator:
    return Evaluator(garments["train"], garments["heldout"], extractor, 1000, "cpu")


@pytest.fixture(scope="module")
def features(garments: dict[str, Images], extractor: Extractor) -> tuple[Tensor, Tensor]:
    """(300, 64) of held-out pictures and (250, 64) of training pictures with noise: neither equal nor far apart."""
    noise = torch.from_numpy(
        np.random.default_rng(0).normal(0, 0.1, (250, 1, 32, 32)).astype(np.float32)
    )
    real = torch.from_numpy(garments["heldout"].centered(slice(0, 300)))
    return extractor.features(real).double(), extractor.features(
        torch.from_numpy(garments["train"].centered(slice(0, 250))) + noise
    ).double()


# ---------------------------------------------------------------- against other implementations


class Given(nn.Module):
    """Where torchmetrics wants an extractor of pictures: what it is given are features (N, 1, 1, D) already."""

    num_features = 64

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_frechet_distance_is_that_of_torchmetrics_and_torch_fidelity(
    features: tuple[Tensor, Tensor],
) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    found = quality.frechet_distance(*features)
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    for points, real in zip(features, (True, False), strict=True):
        metric.update(points[:, None, None], real=real)
    assert found == pytest.approx(float(metric.compute()), rel=1e-9)
    reference = fid_statistics_to_metric(*map(fid_features_to_statistics, features), verbose=False)[
        "frechet_inception_distance"
    ]
    assert found == pytest.approx(reference, rel=1e-9)


def test_frechet_distance_by_hand() -> None:
    """On a line it is (m1 - m2)^2 + (s1 - s2)^2; a shift costs its square, in any number of dimensions."""
    line = torch.tensor([[0.0], [2.0]]).double()  # mean 1, variance 2
    assert quality.frechet_distance(line, 3 * line) == pytest.approx(
        4 + 8
    )  # mean 3, standard deviation 3 sqrt(2)
    points = torch.from_numpy(
        np.random.default_rng(0).standard_normal((10, 50))
    )  # fewer than dimensions
    assert quality.frechet_distance(points, points + 2) == pytest.approx(4 * 50)
    assert quality.frechet_distance(points, points.flip(0)) == pytest.approx(0, abs=1e-12)


def test_kid_is_that_of_torchmetrics_and_torch_fidelity(features: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import KernelInceptionDistance

    first, second = features[0][:200], features[1][:200]
    whole = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=200).set_dtype(
        torch.float64
    )
    whole.update(first[:, None, None], real=True)
    whole.update(second[:, None, None], real=False)
    assert quality.mmd(first, second) == pytest.approx(float(whole.compute()[0]), rel=1e-9)
    arguments = {"kid_subsets": 1, "kid_subset_size": 200, "rng_seed": 0, "verbose": False}
    assert quality.mmd(first, second) == pytest.approx(
        kid_features_to_metric(first, second, **arguments)["kernel_inception_distance_mean"]
    )
    # Over subsets of half of the points, whose draws are others'.
    mean, spread = quality.kid(first, second)
    reference = kid_features_to_metric(
        first, second, **arguments | {"kid_subsets": 1000, "kid_subset_size": 100}
    )
    assert spread == pytest.approx(reference["kernel_inception_distance_std"], rel=0.2)
    assert mean == pytest.approx(
        reference["kernel_inception_distance_mean"], abs=3 * spread / quality.NUM_SUBSETS**0.5
    )


def test_kid_of_equal_distributions_is_around_zero(features: tuple[Tensor, Tensor]) -> None:
    """Unbiased: with the diagonal left in, it would be above zero by the mean distance of a point to the others."""
    draw = np.random.default_rng(0)
    halves = [features[0][torch.from_numpy(draw.permutation(300))].chunk(2) for _ in range(50)]
    found = [quality.mmd(*half) for half in halves]
    assert abs(np.mean(found)) < 3 * np.std(found) / 50**0.5 + 1e-4


def test_precision_and_recall_are_those_of_torch_fidelity(features: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, made = features
    reference = prc_features_to_metric(
        made, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    assert quality.precision_recall(real, made) == pytest.approx(
        (reference["precision"], reference["recall"]), abs=1e-7
    )
    assert reference["precision"] != reference["recall"]


@pytest.mark.parametrize("block", [7, 500])
def test_density_and_coverage_are_the_paper_s(
    features: tuple[Tensor, Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naeem et al. 2020, equations 5 and 6, in loops; however the distances are cut into blocks."""
    monkeypatch.setattr(quality, "BLOCK", block)
    k, real, made = 5, features[0][:80].numpy(), features[1][:60].numpy()
    density, covered = 0, 0
    for i in range(len(real)):
        radius = sorted(np.linalg.norm(real[i] - real[j]) for j in range(len(real)) if j != i)[
            k - 1
        ]
        inside = sum(np.linalg.norm(real[i] - made[j]) <= radius for j in range(len(made)))
        density += inside
        covered += inside > 0
    expected = (density / (k * len(made)), covered / len(real))
    assert quality.density_coverage(
        torch.from_numpy(real), torch.from_numpy(made)
    ) == pytest.approx(expected)


def test_near_copies_far_from_the_origin() -> None:
    """Copies are within their originals' balls, and what is a hundred radii away is not: distances by matrix products would not tell."""
    points = 1e7 + torch.from_numpy(np.random.default_rng(0).standard_normal((50, 8))) * 1e-3
    assert quality.precision_recall(points, points.clone(), k=1) == (1, 1)
    assert quality.density_coverage(points, points.clone(), k=1)[1] == 1
    assert quality.precision_recall(points, points + 0.1, k=1) == (0, 0)


# ---------------------------------------------------------------- modes and slices


def test_mode_figures_by_hand() -> None:
    """Real shares 1/2, 1/4, 1/4, 0 and none unsure; mode 1 has less than a third of its share, mode 3 is nowhere real."""
    real, made = (
        torch.tensor([0, 0, 1, 2] * 10),
        torch.tensor([0] * 24 + [1] * 3 + [2] * 4 + [3] * 8 + [-1]),
    )
    modes, divergence = quality.mode_figures(real, made, 4)
    assert modes == 2
    shares, smoothed = np.array([24, 3, 4, 8, 1]) / 40, np.array([21, 11, 11, 1, 1]) / 45
    assert divergence == pytest.approx(float((shares * np.log(shares / smoothed)).sum()))
    assert quality.mode_figures(real, real, 4)[0] == 3
    assert quality.mode_figures(real, torch.full((7,), -1), 4)[0] == 0
    assert quality.mode_figures(torch.tensor([0, -1]), torch.tensor([0, -1]), 1)[0] == 1, (
        "pictures of no mode are none"
    )


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
    expected = 0.5 * 16 * np.sqrt(2 / (np.pi * 256))
    found = quality.sliced_wasserstein(quality.project(pictures), quality.project(pictures + 0.5))
    assert found == pytest.approx(expected, rel=0.1)


# ---------------------------------------------------------------- verdicts on real pictures


@pytest.fixture(scope="module")
def verdict(judge: Evaluator) -> Callable[[Generate], dict[str, float]]:
    """What the judge says of a generator, each figure but the number of samples without "heldout_"."""

    def judged(generate: Generate) -> dict[str, float]:
        return {tag.removeprefix("heldout_"): value for tag, value in judge(generate).items()}

    return judged


@pytest.fixture(scope="module")
def others(judge: Evaluator, garments: dict[str, Images]) -> np.ndarray:
    """Training pictures that are not the floor's."""
    return np.setdiff1d(np.arange(len(garments["train"])), np.concatenate(judge.stand_ins))


def of(pictures: Images, chosen: np.ndarray) -> Generate:
    """A generator of these pictures, in turn."""
    place = iter(range(10**9))
    return lambda part: torch.from_numpy(
        pictures.centered(chosen[[next(place) % len(chosen) for _ in part]])
    )


def test_other_real_pictures_are_at_the_baseline(
    verdict: Callable, garments: dict[str, Images], others: np.ndarray
) -> None:
    found = verdict(of(garments["train"], np.random.default_rng(0).permutation(others)))
    assert found["samples"] == 1000
    assert found["frechet_distance"] < 2 * found["frechet_distance_baseline"]
    assert abs(found["kid"]) < 2 * found["kid_spread"]
    for tag in ("precision", "recall", "density", "coverage"):
        assert found[tag] > found[f"{tag}_baseline"] - 0.05, tag
    assert found["modes"] == found["modes_baseline"] == 10
    assert found["mode_kl"] < 0.02
    assert found["sliced_wasserstein"] < 1.5 * found["sliced_wasserstein_baseline"]


def test_a_memoriser_is_told_by_recall_and_coverage(
    verdict: Callable, garments: dict[str, Images]
) -> None:
    """50 pictures repeated look as good as real ones, and have all modes: only what looks for variety sees it."""
    found = verdict(of(garments["train"], np.arange(50)))
    assert found["recall"] < 0.1 < found["recall_baseline"] - 0.5
    assert found["coverage"] < 0.5 * found["coverage_baseline"]
    assert found["precision"] > found["precision_baseline"] - 0.1
    assert found["modes"] >= 9


def test_a_generator_that_comes_to_copy_or_to_make_one_class_is_a_collapse(
    judge: Evaluator, garments: dict[str, Images], others: np.ndarray
) -> None:
    train = garments["train"]
    assert train.labels is not None
    for collapsed in (np.arange(50), np.flatnonzero(train.labels == 6)):
        alarms = Alarms("wgan-gp")
        assert alarms.evaluated(100, judge(of(train, others))) == []
        found = alarms.evaluated(200, judge(of(train, collapsed)))
        assert "collapse" in {alarm.kind for alarm in found}


@pytest.mark.parametrize(
    "label", [2, 6, 9]
)  # a shirt is what is most often taken for another, a pullover next
def test_a_class_alone_is_one_mode(
    label: int, verdict: Callable, garments: dict[str, Images]
) -> None:
    train = garments["train"]
    assert train.labels is not None
    found = verdict(of(train, np.flatnonzero(train.labels == label)))
    assert found["modes"] == 1
    assert found["mode_kl"] > 1
    assert found["coverage"] < 0.5 * found["coverage_baseline"]
    assert found["frechet_distance"] > 20 * found["frechet_distance_baseline"]
    assert found["precision"] > 0.7, "each picture by itself is a real one"


def test_missing_classes_are_counted(verdict: Callable, garments: dict[str, Images]) -> None:
    train = garments["train"]
    assert train.labels is not None
    found = verdict(
        of(train, np.random.default_rng(0).permutation(np.flatnonzero(train.labels < 7)))
    )
    assert found["modes"] == 7
    assert found["mode_kl"] > 0.2


@pytest.mark.parametrize("damage", ["blur", "noise"])
def test_damaged_pictures_are_told_from_real_ones(
    damage: str, verdict: Callable, garments: dict[str, Images], others: np.ndarray
) -> None:
    real = of(garments["train"], np.random.default_rng(0).permutation(others))
    draw = torch.Generator().manual_seed(0)

    def generate(part: np.ndarray) -> Tensor:
        images = real(part)
        return (
            gaussian_blur(images, [5, 5], [1.0, 1.0])
            if damage == "blur"
            else images + 0.3 * torch.randn(images.shape, generator=draw)
        )

    found = verdict(generate)
    assert found["frechet_distance"] > 10 * found["frechet_distance_baseline"]
    assert found["kid"] > 10 * found["kid_spread"]
    assert found["density"] < 0.8 * found["density_baseline"]
    assert found["coverage"] < 0.8 * found["coverage_baseline"]


def test_nothing_but_noise_is_nothing(verdict: Callable) -> None:
    draw = torch.Generator().manual_seed(0)
    found = verdict(lambda part: 2 * torch.rand(len(part), 1, 32, 32, generator=draw) - 1)
    assert found["coverage"] < 0.05
    assert found["precision"] < 0.1
    assert found["recall"] < 0.1
    assert found["modes"] <= 1
    assert found["mode_kl"] > 1
    assert found["sliced_wasserstein"] > 5 * found["sliced_wasserstein_baseline"]


# ---------------------------------------------------------------- the judge


def test_the_verdict_is_the_same_at_each_call_and_in_each_run(
    garments: dict[str, Images], extractor: Extractor
) -> None:
    def mirrored(part: np.ndarray) -> Tensor:
        return torch.from_numpy(garments["train"].centered(part)).flip(3)

    judge, again = (
        Evaluator(garments["train"], garments["heldout"], extractor, 200, "cpu") for _ in range(2)
    )
    found = judge(mirrored)
    assert judge(mirrored) == found
    assert again(mirrored) == found
    assert {tag for tag in found if not tag.endswith("_baseline")} == {
        *(
            f"heldout_{tag}"
            for tag in (
                "frechet_distance",
                "kid",
                "kid_spread",
                "precision",
                "recall",
                "density",
                "coverage",
            )
        ),
        *("heldout_modes", "heldout_mode_kl", "heldout_sliced_wasserstein", "heldout_samples"),
    }
    without = {"heldout_kid_spread", "heldout_samples"}
    assert all(
        f"{tag}_baseline" in found
        for tag in found
        if not tag.endswith("_baseline") and tag not in without
    )


def test_pictures_are_drawn_from_all_classes(
    garments: dict[str, Images], extractor: Extractor
) -> None:
    """A folder's pictures lie class by class: the first ones would be of one class. The floor's own pictures are at the floor."""
    seen: list[int] = []

    def generate(part: np.ndarray) -> Tensor:
        seen.extend(part.tolist())
        return torch.from_numpy(garments["train"].centered(part))

    found = Evaluator(garments["train"], garments["heldout"], extractor, 200, "cpu")(generate)
    assert all(
        found[tag] == found[f"{tag}_baseline"] for tag in found if f"{tag}_baseline" in found
    )
    assert found["heldout_samples"] == len(set(seen)) == 200
    assert max(seen) > 8000


def test_batches_do_not_matter(
    garments: dict[str, Images], extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blurred(part: np.ndarray) -> Tensor:
        return gaussian_blur(torch.from_numpy(garments["train"].centered(part)), [3, 3])

    found = []
    for size in (100, 37):
        monkeypatch.setattr(quality, "BATCH", size)
        found.append(
            Evaluator(garments["train"], garments["heldout"], extractor, 150, "cpu")(blurred)
        )
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_a_handful_of_pictures_can_be_judged(
    garments: dict[str, Images], extractor: Extractor
) -> None:
    found = Evaluator(garments["train"], garments["heldout"], extractor, 4, "cpu")(
        lambda part: torch.zeros(len(part), 1, 32, 32)
    )
    assert all(np.isfinite(value) for value in found.values())


def test_a_generator_of_nan_gets_nan(garments: dict[str, Images], extractor: Extractor) -> None:
    """What then stops the run is the trainer's business: see `train.run.recorder.finite`."""
    found = Evaluator(garments["train"], garments["heldout"], extractor, 20, "cpu")(
        lambda part: torch.full((len(part), 1, 32, 32), torch.nan)
    )
    assert np.isnan(found["heldout_frechet_distance"])
    assert np.isnan(found["heldout_kid"])
    assert found["heldout_coverage"] == found["heldout_modes"] == 0


# ---------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file as torch-fidelity's, of a net that has learned nothing."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    path = str(tmp_path_factory.mktemp("weights") / "inception.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(
            inception.FeatureExtractorInceptionV3("inception-v3", ["2048"]).state_dict(), path
        )
    return path


def test_with_inception_there_is_an_fid(
    garments: dict[str, Images], extractor: Extractor, weights: str
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    judge = Evaluator(garments["train"], garments["heldout"], extractor, 4, "cpu", weights)
    own = [
        torch.from_numpy(side.pixels[:2, ..., 0].copy())[:, None].repeat(1, 3, 1, 1)
        for side in garments.values()
    ]
    assert judge.inception is not None
    ours = torch.cat(
        [
            judge.inception(torch.from_numpy(side.centered(slice(0, 2))))
            for side in garments.values()
        ]
    )
    net = FeatureExtractorInceptionV3(
        "inception-v3", ["2048"], feature_extractor_weights_path=weights
    )
    assert torch.equal(ours, net(torch.cat(own))[0]), (
        "the 8 bits of a picture reach Inception as they were"
    )
    found = judge(lambda part: torch.from_numpy(garments["train"].centered(part)))
    assert found["heldout_fid"] == found["heldout_fid_baseline"] > 0


def test_what_inception_lacks_is_said_in_a_sentence(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path | str, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence) as caught:
            quality.inception(str(path), "cpu")
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none.pth", r"^quality\.inception: there is no file .*none\.pth: give")
    damaged, another = tmp_path / "damaged.pth", tmp_path / "another.pth"
    damaged.write_bytes(Path(weights).read_bytes()[:1000])
    refused(damaged, r"damaged\.pth does not hold Inception's weights .*: give")
    torch.save(torch.nn.Linear(2, 2).state_dict(), another)
    refused(another, r"another\.pth does not hold Inception's weights .*: give")
    monkeypatch.setitem(
        __import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None
    )
    refused(weights, r"needs torch-fidelity: install it with `pip install 'raykiln\[inception\]'`")


def test_a_run_and_a_search_ask_for_inception_before_anything_starts(
    command: Callable, tmp_path: Path
) -> None:
    for verb in ("train", "tune"):
        answer = command(
            verb,
            "gan",
            "--config",
            "gan-tiny",
            "--storage",
            str(tmp_path),
            "--quality.inception",
            "/nowhere/weights.pth",
        )
        assert answer.returncode == 2
        assert answer.stderr.startswith(
            "error: quality.inception: there is no file /nowhere/weights.pth: give"
        )
        assert not list(tmp_path.iterdir())

"""Metrics of image quality: against torchmetrics, torch-fidelity and the papers' formulas, and on
real images, copies and noise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from cluster import cli
from models.nets.features import Extractor
from train import __main__ as train
from train.config.data import ImageData
from train.data.images import Images, prepare
from train.data.shipped.files import shipped
from train.gan import distances, evaluator, inception
from train.gan.alarms import Alarms
from train.gan.evaluator import Evaluator
from train.gan.extractor_file import unpack
from tune import __main__ as tune

Generate = Callable[[np.ndarray], Tensor]
Evaluate = Callable[[Generate], dict[str, float]]


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Images]:
    dataset = prepare(ImageData(), str(tmp_path_factory.mktemp("kiln")))
    return {split: Images(dataset, split, 32) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return unpack(shipped("fashion-mnist-extractor.safetensors").read_bytes(), "shipped")[0]


@pytest.fixture(scope="module")
def full_evaluator(garments: dict[str, Images], extractor: Extractor) -> Evaluator:
    return Evaluator(garments["train"], garments["heldout"], extractor, 1000, "cpu")


@pytest.fixture(scope="module")
def features(garments: dict[str, Images], extractor: Extractor) -> tuple[Tensor, Tensor]:
    """(300, 64) of held-out images and (250, 64) of training images with noise: neither equal nor
    far apart."""
    noise = np.random.default_rng(0).normal(0, 0.1, (250, 1, 32, 32)).astype(np.float32)
    heldout = torch.from_numpy(garments["heldout"].centered(slice(0, 300)))
    noisy = torch.from_numpy(garments["train"].centered(slice(0, 250)) + noise)
    return extractor.features(heldout).double(), extractor.features(noisy).double()


# ---- distances: against other implementations


class Identity(nn.Module):
    """The feature extractor that torchmetrics asks for, for inputs (N, 1, 1, D) that are features
    already."""

    num_features = 64

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_frechet_distance_equals_torchmetrics_and_torch_fidelity(
    features: tuple[Tensor, Tensor],
) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = distances.frechet_distance(*features)
    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    for points, real in zip(features, (True, False), strict=True):
        metric.update(points[:, None, None], real=real)
    assert distance == pytest.approx(float(metric.compute()), rel=1e-9)
    statistics = [fid_features_to_statistics(points) for points in features]
    reference = fid_statistics_to_metric(*statistics, verbose=False)
    assert distance == pytest.approx(reference["frechet_inception_distance"], rel=1e-9)


def test_frechet_distance_equals_values_worked_out_by_hand() -> None:
    """In one dimension it is (m1 - m2)^2 + (s1 - s2)^2; a shift costs its square, in any number of
    dimensions."""
    line = torch.tensor([[0.0], [2.0]]).double()  # mean 1, variance 2
    # 3 * line has mean 3 and standard deviation 3 sqrt(2).
    assert distances.frechet_distance(line, 3 * line) == pytest.approx(4 + 8)
    # Fewer points than dimensions.
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((10, 50)))
    assert distances.frechet_distance(points, points + 2) == pytest.approx(4 * 50)
    assert distances.frechet_distance(points, points.flip(0)) == pytest.approx(0, abs=1e-12)


def test_kid_equals_torchmetrics_and_torch_fidelity(features: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import KernelInceptionDistance

    first, second = features[0][:200], features[1][:200]
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=200)
    metric.set_dtype(torch.float64)
    metric.update(first[:, None, None], real=True)
    metric.update(second[:, None, None], real=False)
    assert distances.mmd(first, second) == pytest.approx(float(metric.compute()[0]), rel=1e-9)
    arguments = {"kid_subsets": 1, "kid_subset_size": 200, "rng_seed": 0, "verbose": False}
    whole = kid_features_to_metric(first, second, **arguments)
    assert distances.mmd(first, second) == pytest.approx(whole["kernel_inception_distance_mean"])
    # Over subsets of half of the points, which torch-fidelity draws otherwise.
    mean, spread = distances.kid(first, second)
    arguments |= {"kid_subsets": 1000, "kid_subset_size": 100}
    halves = kid_features_to_metric(first, second, **arguments)
    assert spread == pytest.approx(halves["kernel_inception_distance_std"], rel=0.2)
    standard_error = spread / distances.NUM_SUBSETS**0.5
    assert mean == pytest.approx(halves["kernel_inception_distance_mean"], abs=3 * standard_error)


def test_mmd_of_equal_distributions_is_zero_on_average(features: tuple[Tensor, Tensor]) -> None:
    """The estimate is unbiased: with the kernel's diagonal it would be above zero by the mean
    distance of a point to the others."""
    draw = np.random.default_rng(0)
    halves = [features[0][torch.from_numpy(draw.permutation(300))].chunk(2) for _ in range(50)]
    found = [distances.mmd(*half) for half in halves]
    assert abs(np.mean(found)) < 3 * np.std(found) / 50**0.5 + 1e-4


def test_precision_and_recall_equal_torch_fidelity(features: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = features
    reference = prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    assert distances.precision_recall(real, generated) == pytest.approx(
        (reference["precision"], reference["recall"]), abs=1e-7
    )
    assert reference["precision"] != reference["recall"]


@pytest.mark.parametrize("block", [7, 500])
def test_density_and_coverage_follow_the_paper(
    features: tuple[Tensor, Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naeem et al. 2020, equations 5 and 6, as loops, for any block size of the distances."""
    monkeypatch.setattr(distances, "BLOCK", block)
    k, real, generated = 5, features[0][:80].numpy(), features[1][:60].numpy()
    density, covered = 0, 0
    for i, center in enumerate(real):
        others = (point for j, point in enumerate(real) if j != i)
        radius = sorted(np.linalg.norm(center - point) for point in others)[k - 1]
        inside = sum(np.linalg.norm(center - point) <= radius for point in generated)
        density += inside
        covered += inside > 0
    expected = (density / (k * len(generated)), covered / len(real))
    found = distances.density_coverage(torch.from_numpy(real), torch.from_numpy(generated))
    assert found == pytest.approx(expected)


def test_distances_of_near_copies_far_from_the_origin_are_exact() -> None:
    """Copies are within the balls of their originals, and points a hundred radii away are not:
    distances by matrix products could not separate them."""
    points = 1e7 + torch.from_numpy(np.random.default_rng(0).standard_normal((50, 8))) * 1e-3
    assert distances.precision_recall(points, points.clone(), k=1) == (1, 1)
    assert distances.density_coverage(points, points.clone(), k=1)[1] == 1
    assert distances.precision_recall(points, points + 0.1, k=1) == (0, 0)


# ---- distances: modes and slices


def test_mode_metrics_equal_values_worked_out_by_hand() -> None:
    """Real fractions are 1/2, 1/4, 1/4, 0, and 0 for no mode. Mode 1 has less than a third of its
    real fraction; mode 3 has no real image."""
    real = torch.tensor([0, 0, 1, 2] * 10)
    generated = torch.tensor([0] * 24 + [1] * 3 + [2] * 4 + [3] * 8 + [-1])
    modes, divergence = distances.mode_metrics(real, generated, 4)
    assert modes == 2
    fractions, smoothed = np.array([24, 3, 4, 8, 1]) / 40, np.array([21, 11, 11, 1, 1]) / 45
    assert divergence == pytest.approx(float((fractions * np.log(fractions / smoothed)).sum()))
    assert distances.mode_metrics(real, real, 4)[0] == 3
    assert distances.mode_metrics(real, torch.full((7,), -1), 4)[0] == 0
    one_without_mode = torch.tensor([0, -1])
    assert distances.mode_metrics(one_without_mode, one_without_mode, 1)[0] == 1, (
        "images of no mode do not count as a mode"
    )


def test_sliced_wasserstein_equals_values_worked_out_by_hand() -> None:
    """In the first direction, the sorted points are 0, 1, 5 and 1, 2, 3: (1 + 1 + 2) / 3; in the
    second they are equal."""
    first = torch.tensor([[5.0, 1.0], [0.0, 2.0], [1.0, 3.0]])
    second = torch.tensor([[1.0, 3.0], [3.0, 1.0], [2.0, 2.0]])
    assert distances.sliced_wasserstein(first, second) == pytest.approx(4 / 3 / 2)
    assert distances.sliced_wasserstein(first, first[[2, 0, 1]]) == 0


def test_sliced_wasserstein_refuses_sets_of_different_size() -> None:
    with pytest.raises(ValueError, match="equal size"):
        distances.sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection() -> None:
    """All images shifted by v: a direction d costs |v . d|, with a mean of |v| sqrt(2 / (pi D)) for
    random directions."""
    torch.manual_seed(0)
    images = torch.randn(50, 1, 16, 16)
    expected = 0.5 * 16 * np.sqrt(2 / (np.pi * 256))
    found = distances.sliced_wasserstein(distances.project(images), distances.project(images + 0.5))
    assert found == pytest.approx(expected, rel=0.1)


# ---- the evaluator on real, copied and damaged images


@pytest.fixture(scope="module")
def evaluate(full_evaluator: Evaluator) -> Evaluate:
    """Evaluate a generator; the metrics' names are without "heldout_"."""

    def evaluate(generate: Generate) -> dict[str, float]:
        metrics = full_evaluator(generate)
        return {name.removeprefix("heldout_"): value for name, value in metrics.items()}

    return evaluate


@pytest.fixture(scope="module")
def others(full_evaluator: Evaluator, garments: dict[str, Images]) -> np.ndarray:
    """Indices of the training images that the baseline does not use."""
    used = np.concatenate(full_evaluator.train_batches)
    return np.setdiff1d(np.arange(len(garments["train"])), used)


def generator_of(images: Images, indices: np.ndarray) -> Generate:
    """A generator of these images, one after the other."""
    position = iter(range(10**9))
    return lambda part: torch.from_numpy(
        images.centered(indices[[next(position) % len(indices) for _ in part]])
    )


def shuffled(indices: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(indices)


def with_labels(images: Images, predicate: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Indices of the images whose labels satisfy the predicate."""
    assert images.labels is not None
    return np.flatnonzero(predicate(images.labels))


def test_other_real_images_reach_the_baseline(
    evaluate: Evaluate, garments: dict[str, Images], others: np.ndarray
) -> None:
    found = evaluate(generator_of(garments["train"], shuffled(others)))
    assert found["samples"] == 1000
    assert found["frechet_distance"] < 2 * found["frechet_distance_baseline"]
    assert abs(found["kid"]) < 2 * found["kid_spread"]
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name] > found[f"{name}_baseline"] - 0.05, name
    assert found["modes"] == found["modes_baseline"] == 10
    assert found["mode_kl"] < 0.02
    assert found["sliced_wasserstein"] < 1.5 * found["sliced_wasserstein_baseline"]


def test_recall_and_coverage_detect_memorization(
    evaluate: Evaluate, garments: dict[str, Images]
) -> None:
    """50 repeated images are as realistic as real ones and have all modes: only metrics of variety
    detect them."""
    found = evaluate(generator_of(garments["train"], np.arange(50)))
    assert found["recall"] < 0.1 < found["recall_baseline"] - 0.5
    assert found["coverage"] < 0.5 * found["coverage_baseline"]
    assert found["precision"] > found["precision_baseline"] - 0.1
    assert found["modes"] >= 9


def test_copies_or_a_single_class_after_variety_are_a_collapse(
    full_evaluator: Evaluator, garments: dict[str, Images], others: np.ndarray
) -> None:
    train = garments["train"]
    for collapsed in (np.arange(50), with_labels(train, lambda labels: labels == 6)):
        alarms = Alarms("wgan-gp")
        assert alarms.evaluated(100, full_evaluator(generator_of(train, others))) == []
        found = alarms.evaluated(200, full_evaluator(generator_of(train, collapsed)))
        assert "collapse" in {alarm.kind for alarm in found}


# Shirts are confused most often with other classes, pullovers next.
@pytest.mark.parametrize("label", [2, 6, 9])
def test_single_class_is_one_mode(
    label: int, evaluate: Evaluate, garments: dict[str, Images]
) -> None:
    train = garments["train"]
    found = evaluate(generator_of(train, with_labels(train, lambda labels: labels == label)))
    assert found["modes"] == 1
    assert found["mode_kl"] > 1
    assert found["coverage"] < 0.5 * found["coverage_baseline"]
    assert found["frechet_distance"] > 20 * found["frechet_distance_baseline"]
    assert found["precision"] > 0.7, "each image by itself is a real one"


def test_missing_classes_are_counted(evaluate: Evaluate, garments: dict[str, Images]) -> None:
    train = garments["train"]
    seven = with_labels(train, lambda labels: labels < 7)
    found = evaluate(generator_of(train, shuffled(seven)))
    assert found["modes"] == 7
    assert found["mode_kl"] > 0.2


@pytest.mark.parametrize("damage", ["blur", "noise"])
def test_damaged_images_score_worse_than_real_ones(
    damage: str, evaluate: Evaluate, garments: dict[str, Images], others: np.ndarray
) -> None:
    real = generator_of(garments["train"], shuffled(others))
    draw = torch.Generator().manual_seed(0)

    def generate(part: np.ndarray) -> Tensor:
        images = real(part)
        if damage == "noise":
            return images + 0.3 * torch.randn(images.shape, generator=draw)
        return gaussian_blur(images, [5, 5], [1.0, 1.0])

    found = evaluate(generate)
    assert found["frechet_distance"] > 10 * found["frechet_distance_baseline"]
    assert found["kid"] > 10 * found["kid_spread"]
    assert found["density"] < 0.8 * found["density_baseline"]
    assert found["coverage"] < 0.8 * found["coverage_baseline"]


def test_noise_has_no_quality(evaluate: Evaluate) -> None:
    draw = torch.Generator().manual_seed(0)
    found = evaluate(lambda part: 2 * torch.rand(len(part), 1, 32, 32, generator=draw) - 1)
    assert found["coverage"] < 0.05
    assert found["precision"] < 0.1
    assert found["recall"] < 0.1
    assert found["modes"] <= 1
    assert found["mode_kl"] > 1
    assert found["sliced_wasserstein"] > 5 * found["sliced_wasserstein_baseline"]


# ---- the evaluator


def test_metrics_are_the_same_at_each_call_and_in_each_run(
    garments: dict[str, Images], extractor: Extractor
) -> None:
    def mirrored(part: np.ndarray) -> Tensor:
        return torch.from_numpy(garments["train"].centered(part)).flip(3)

    first, second = (
        Evaluator(garments["train"], garments["heldout"], extractor, 200, "cpu") for _ in range(2)
    )
    found = first(mirrored)
    assert first(mirrored) == found
    assert second(mirrored) == found
    without_baseline = {"heldout_kid_spread", "heldout_samples"}
    with_baseline = {
        "heldout_frechet_distance",
        "heldout_kid",
        "heldout_precision",
        "heldout_recall",
        "heldout_density",
        "heldout_coverage",
        "heldout_modes",
        "heldout_mode_kl",
        "heldout_sliced_wasserstein",
    }
    metrics = {name for name in found if not name.endswith("_baseline")}
    assert metrics == with_baseline | without_baseline
    assert all(f"{name}_baseline" in found for name in with_baseline)


def test_evaluated_images_are_drawn_from_all_classes(
    garments: dict[str, Images], extractor: Extractor
) -> None:
    """A folder's images are ordered by class: the first ones would be of one class. The baseline's
    own images score as the baseline."""
    drawn: list[int] = []

    def generate(part: np.ndarray) -> Tensor:
        drawn.extend(part.tolist())
        return torch.from_numpy(garments["train"].centered(part))

    found = Evaluator(garments["train"], garments["heldout"], extractor, 200, "cpu")(generate)
    with_baseline = [name for name in found if f"{name}_baseline" in found]
    assert all(found[name] == found[f"{name}_baseline"] for name in with_baseline)
    assert found["heldout_samples"] == len(set(drawn)) == 200
    assert max(drawn) > 8000


def test_metrics_do_not_depend_on_the_batch_size(
    garments: dict[str, Images], extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blurred(part: np.ndarray) -> Tensor:
        return gaussian_blur(torch.from_numpy(garments["train"].centered(part)), [3, 3])

    found = []
    for size in (100, 37):
        monkeypatch.setattr(evaluator, "BATCH", size)
        small = Evaluator(garments["train"], garments["heldout"], extractor, 150, "cpu")
        found.append(small(blurred))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_metrics_of_four_images_are_finite(
    garments: dict[str, Images], extractor: Extractor
) -> None:
    small = Evaluator(garments["train"], garments["heldout"], extractor, 4, "cpu")
    found = small(lambda part: torch.zeros(len(part), 1, 32, 32))
    assert all(np.isfinite(value) for value in found.values())


def test_nan_images_give_nan_metrics(garments: dict[str, Images], extractor: Extractor) -> None:
    """The training loop then stops the run: see `train.run.recorder.check_finite`."""
    small = Evaluator(garments["train"], garments["heldout"], extractor, 20, "cpu")
    found = small(lambda part: torch.full((len(part), 1, 32, 32), torch.nan))
    assert np.isnan(found["heldout_frechet_distance"])
    assert np.isnan(found["heldout_kid"])
    assert found["heldout_coverage"] == found["heldout_modes"] == 0


# ---- Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file like torch-fidelity's, of an untrained net."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    path = str(tmp_path_factory.mktemp("weights") / "inception.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = fidelity.FeatureExtractorInceptionV3("inception-v3", ["2048"])
        torch.save(net.state_dict(), path)
    return path


def test_inception_weights_add_the_fid(
    garments: dict[str, Images], extractor: Extractor, weights: str
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    small = Evaluator(garments["train"], garments["heldout"], extractor, 4, "cpu", weights)
    compute = small.inception
    assert compute is not None
    ours = torch.cat(
        [compute(torch.from_numpy(side.centered(slice(0, 2)))) for side in garments.values()]
    )
    pixels = [
        torch.from_numpy(side.pixels[:2, ..., 0].copy())[:, None].repeat(1, 3, 1, 1)
        for side in garments.values()
    ]
    net = FeatureExtractorInceptionV3(
        "inception-v3", ["2048"], feature_extractor_weights_path=weights
    )
    assert torch.equal(ours, net(torch.cat(pixels))[0]), "Inception gets the original 8-bit pixels"
    found = small(lambda part: torch.from_numpy(garments["train"].centered(part)))
    assert found["heldout_fid"] == found["heldout_fid_baseline"] > 0


def test_unusable_inception_weights_are_refused_in_one_line(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path | str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            inception.load(str(path), "cpu")
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none.pth", r"^quality\.inception is .*none\.pth, which is no file: give")
    damaged, another = tmp_path / "damaged.pth", tmp_path / "another.pth"
    damaged.write_bytes(Path(weights).read_bytes()[:1000])
    refused(damaged, r"damaged\.pth, which does not hold Inception's weights \(.*\): give")
    torch.save(torch.nn.Linear(2, 2).state_dict(), another)
    refused(another, r"another\.pth, which does not hold Inception's weights \(.*\): give")
    monkeypatch.setitem(
        __import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None
    )
    refused(weights, r"needs torch-fidelity: install it with `pip install 'raykiln\[inception\]'`")


@pytest.mark.parametrize("main", [train.main, tune.main], ids=["train", "tune"])
def test_run_and_search_check_inception_weights_before_they_start(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gan", "--config", "gan-tiny", "--storage", str(tmp_path)]
    assert cli.run(main, [*words, "--quality.inception", "/nowhere/weights.pth"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: quality.inception is /nowhere/weights.pth, which is no file: give"
    )
    assert not list(tmp_path.iterdir())

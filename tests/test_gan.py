"""GAN training: the same at any number of workers, resumed exactly, and on Ray."""

import copy
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from models.images import split_sheet
from models.nets.features import Extractor, ExtractorConfig
from tests.support import workers
from train.config.loader import load
from train.data import images
from train.data.dataset import Dataset
from train.data.images import Images
from train.gan import extractor_file, loop
from train.gan.config import GanConfig
from train.gan.evaluator import Evaluator
from train.gan.film import GUTTER
from train.gan.samples import Sampler
from train.gan.trainer import Batch, GanTrainer, net_config
from train.launch import fit
from train.parallel import backends, zero
from train.parallel.state import Halt, Shard, State
from train.parallel.strategy import Ddp
from train.run import records
from train.run.checkpoint import Checkpointer, complete, newest
from train.run.recorder import NullRecorder, Recorder

STEPS = 3
SMALL = {
    "run.seed": 5,
    "batch.global_size": 16,
    "batch.micro_size": 16,
    "data.size": 28,
    "data.random_crop": True,
    "model.width": 4,
    "model.latent_dim": 8,
    "model.ema_decay": 0.5,
    "gan.critic_steps": 2,
    "optim.lr": 1e-3,
    "steps": STEPS,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "conditional": {"model.conditional": True},
    "accumulated": {"batch.micro_size": 4},
    "color": {"data.size": 32, "data.channels": 3},
}


def config_of(variant: str, source: Path, **more: Any) -> GanConfig:
    values = {**SMALL, **VARIANTS[variant], **more}
    folder = source / ("color" if values.get("data.channels") == 3 else "gray")
    config = load("gan", None, {**values, "data.source": [str(folder)]})
    assert isinstance(config, GanConfig)
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of two classes, in grayscale and in color."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for mode, channels in (("gray", 1), ("color", 3)):
        for index in range(120):
            bright = index % 2
            folder = root / mode / ("bright" if bright else "dark")
            folder.mkdir(parents=True, exist_ok=True)
            low, high = 128 * bright, 128 + 127 * bright
            pixels = draw.integers(low, high, (40, 36, channels), np.uint8)
            Image.fromarray(pixels.squeeze()).save(folder / f"{index}.png")
    return root


def prepared(config: GanConfig, root: Path) -> Dataset:
    """The run's data set, with an untrained extractor: its features are the same each time."""
    dataset = images.prepare(config.data, str(root), config.model.conditional)
    torch.manual_seed(0)
    net = Extractor(ExtractorConfig(size=32, channels=config.data.channels, num_classes=2)).eval()
    card = extractor_file.Card("classes", 0.5, 12, 108, ["dark", "bright"], "")
    content = extractor_file.pack(net, card)
    uri = extractor_file.publish(content, dataset.uri, config.data.size)
    return dataset.with_extractor(extractor_file.lineage_entry(uri))


def single(config: GanConfig, root: Path) -> tuple[GanTrainer, Images]:
    """A trainer on this process alone, and its training images."""
    dataset = images.prepare(config.data, str(root), config.model.conditional)
    return GanTrainer(config, net_config(config, dataset), Ddp()), train_images(config, dataset)


def train_images(config: GanConfig, dataset: Dataset) -> Images:
    return Images(dataset, "train", config.data.size, config.data.horizontal_flip)


def advance(trainer: GanTrainer, train: Images, step: int) -> int:
    """Update the critic or the generator, whichever is next; return the generator's steps so
    far."""
    if trainer.critic_updates_in_step < trainer.config.gan.critic_steps:
        trainer.update_critic(trainer.critic_batches(trainer.critic_updates, train))
        return step
    trainer.update_generator(trainer.generator_batches(step))
    trainer.average.update(step)
    return step + 1


# ---- one and two workers train the same

# Norms x objectives x precisions x strategies, and other variants of a GAN.
NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"model.norm": "batch", "model.critic_norm": "layer"},
}
OBJECTIVES = ("wgan-gp", "lsgan", "hinge", "non-saturating")
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    **{
        f"zero{stage}": {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
        for stage in range(3)
    },
}
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32}
# The largest difference of a gradient and of a parameter. In bfloat16, sums that are split over
# workers round differently, and Adam turns that into whole steps: there it is the relative norm of
# the difference of the first gradients.
TOLERANCES = {"fp32": 1e-5, "fp64": 1e-12, "bf16": 0.05}
SINGLE_STEP = {"gan.critic_steps": 1, "steps": 1}
CASES = [
    f"{norm} {objective} {precision} {strategy}"
    for norm, objective, precision, strategy in itertools.product(
        NORMS, OBJECTIVES, PRECISIONS, STRATEGIES
    )
]
CASES += [
    f"{variant} wgan-gp {precision} {strategy}"
    for variant, precision, strategy in itertools.product(
        ["conditional", "accumulated", "color"], PRECISIONS, ["ddp", "zero1"]
    )
]

NETS = ("generator", "generator_ema", "critic")
OPTIMIZERS = ("generator_optimizer", "critic_optimizer")
PARTS = (*NETS, *OPTIMIZERS)
Tensors = dict[str, Tensor]


def config_of_case(case: str, source: Path, workers: int) -> GanConfig:
    variant, objective, precision, strategy = case.split()
    values = {
        "gan.objective": objective,
        "parallel.precision": "bf16" if precision == "bf16" else "fp32",
        "parallel.workers": workers,
    }
    values |= SINGLE_STEP if precision == "bf16" else {}
    values |= NORMS.get(variant, {})
    # A single process accumulates no micro-batches.
    values |= STRATEGIES[strategy] if workers > 1 else {"batch.micro_size": 16}
    return config_of("plain" if variant in NORMS else variant, source, **values)


def after_training(case: str, source: Path, root: Path, workers: int) -> State:
    """What a checkpoint would hold after the case's steps on this process's part of the work, and
    the initial state as "before"."""
    config = config_of_case(case, source, workers)
    torch.set_num_threads(1)
    torch.set_default_dtype(PRECISIONS[case.split()[2]])
    try:
        dataset = images.prepare(config.data, str(root))
        train = train_images(config, dataset)
        trainer = GanTrainer(config, net_config(config, dataset), backends.build(config))
        before = copy.deepcopy(trainer.state())
        step = 0
        while step < config.steps:
            step = advance(trainer, train, step)
        return {"before": before, **copy.deepcopy(trainer.state())}
    finally:
        torch.set_default_dtype(torch.float32)


def train_together(rank: int, source: Path, root: Path) -> None:
    """Save what one of two workers has after every case, and after every resume."""
    resumed = {strategy: resume_at_cuts(strategy, source, root) for strategy in STRATEGIES}
    torch.save(resumed, root / f"resumed{rank}.pt")
    _let_deepspeed_use_doubles()
    states = {case: after_training(case, source, root, 2) for case in CASES}
    torch.save(states, root / f"rank{rank}.pt")


def _let_deepspeed_use_doubles() -> None:
    """Make DeepSpeed exchange gradients, and keep ZeRO's copy of the weights, in the default dtype:
    the rounding of its fp32 could hide an error."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    supported = get_accelerator().supported_dtypes()
    get_accelerator().supported_dtypes = lambda: [*supported, torch.float64]
    DeepSpeedEngine.communication_data_type = property(lambda self: torch.get_default_dtype())
    data_types = DeepSpeedEngine.get_data_types
    DeepSpeedEngine.get_data_types = lambda self: (
        (torch.get_default_dtype(),) * 2 if self.zero_optimization_stage() else data_types(self)
    )
    DeepSpeedZeroOptimizer._configure_master_weights = lambda self, **_: torch.get_default_dtype()
    settings = zero.DeepSpeed.settings

    def with_doubles(self: zero.DeepSpeed, clip: float | None) -> dict[str, Any]:
        found = settings(self, clip)
        # reduce_scatter does not support float64.
        single_precision = torch.get_default_dtype() == torch.float32
        found["zero_optimization"]["reduce_scatter"] = single_precision
        return found

    zero.DeepSpeed.settings = with_doubles  # type: ignore[method-assign]  # in a spawned worker


@pytest.fixture(scope="module")
def two_workers(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of `train_together`."""
    root = tmp_path_factory.mktemp("two")
    for variant in ("plain", "conditional", "color"):
        images.prepare(config_of(variant, source).data, str(root), variant == "conditional")
    workers.spawn(2, train_together, source, root)
    return root


@pytest.fixture(scope="module")
def by_two_workers(two_workers: Path) -> dict[str, State]:
    """The state after each case on two workers, shards joined; both must have the same weights."""
    first, second = (
        torch.load(two_workers / f"rank{rank}.pt", weights_only=False) for rank in range(2)
    )
    for case, part in itertools.product(CASES, NETS):
        for name, value in first[case][part].items():
            assert torch.equal(second[case][part][name], value), (case, part, name)
    for case, part in itertools.product(CASES, OPTIMIZERS):
        first[case][part] = joined(first[case][part], second[case][part])
    return first


def joined(*parts: dict[str, Tensor | Shard]) -> Tensors:
    """Tensors of which each worker has a shard, or all."""
    whole: Tensors = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, Shard):
                empty = torch.full(value.shape, torch.nan, dtype=value.values.dtype)
                target = whole.setdefault(name, empty).view(-1)
                target[value.start : value.start + len(value.values)] = value.values
            else:
                whole[name] = value
    return whole


@pytest.fixture(scope="module")
def by_one_process(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], State]:
    root = tmp_path_factory.mktemp("one")
    return functools.cache(lambda case: after_training(case, source, root, 1))


@pytest.mark.parametrize("case", CASES)
def test_two_workers_have_the_gradients_and_parameters_of_one_process(
    case: str, by_two_workers: dict[str, State], by_one_process: Callable[[str], State]
) -> None:
    variant, objective, precision, _ = case.split()
    alone = by_one_process(f"{variant} {objective} {precision} ddp")
    together = by_two_workers[case]
    for part in OPTIMIZERS if precision == "bf16" else PARTS:
        one, two = change(alone, part), change(together, part)
        assert one.keys() == two.keys()
        apart = {name: two[name] - value for name, value in one.items()}
        difference = norm(apart) / norm(one) if precision == "bf16" else largest(apart)
        assert difference < TOLERANCES[precision], (part, difference)
        assert norm(one) > 1e-2, "without a change, nothing is compared"


def change(state: State, part: str) -> Tensors:
    """What a net or its average moved by; of an optimizer the last gradient, which is Adam's first
    moment, since beta1 is 0."""
    if part.endswith("_optimizer"):
        return {name: value for name, value in state[part].items() if name.startswith("exp_avg/")}
    return {name: value - state["before"][part][name] for name, value in state[part].items()}


def largest(values: Tensors) -> float:
    return max(float(value.abs().max()) for value in values.values())


def norm(values: Tensors) -> float:
    return float(torch.stack([value.double().norm() for value in values.values()]).norm())


# ---- resume


class Interrupted(Exception):
    pass


class InterruptingRecorder(NullRecorder):
    """End the loop as a kill would, between a step's update and its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def metrics(self, step: int, values: dict[str, float]) -> None:
        if step == self.step:
            raise Interrupted


def run_alone(
    config: GanConfig, dataset: Dataset, run_uri: Path, interrupt_at: int | None = None
) -> dict[str, float] | None:
    """Train, or resume, in this process; return the final metrics, None where interrupted."""
    checkpoints = Checkpointer(str(run_uri), config.model_dump())
    recorder: Recorder = NullRecorder()
    if interrupt_at is not None:
        recorder = InterruptingRecorder(interrupt_at)
    worker = workers.LocalWorker(config, Ddp(), checkpoints, recorder, dataset)
    try:
        return loop.train(worker, checkpoints.load())
    except Interrupted:
        checkpoints.join()
        return None


def without_times(metrics: dict[str, float] | None) -> dict[str, float]:
    assert metrics is not None
    return {name: value for name, value in metrics.items() if not name.endswith("_s")}


def test_resumed_run_equals_an_uninterrupted_one_exactly(source: Path, tmp_path: Path) -> None:
    intervals = {"checkpoint.every": 2, "log.every": 1, "log.eval_every": 3}
    config = config_of("conditional", source, steps=6, **intervals)
    dataset = prepared(config, tmp_path)
    uninterrupted = run_alone(config, dataset, tmp_path / "uninterrupted")
    assert run_alone(config, dataset, tmp_path / "resumed", interrupt_at=5) is None
    checkpoint = newest(str(tmp_path / "resumed"))
    assert checkpoint is not None
    assert checkpoint.step == 4
    resumed = run_alone(config, dataset, tmp_path / "resumed")

    states = []
    for run in ("uninterrupted", "resumed"):
        step, state = loaded(tmp_path / run)
        assert step == 6
        states.append(state)
    json_parts = {"generator_progress", "critic_progress", "gan_cadence", "alarms"}
    assert set(states[0]) == {*PARTS, *json_parts}
    for part in PARTS:
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), (part, name)
    for part in json_parts:
        assert states[0][part] == states[1][part]
    assert without_times(uninterrupted) == without_times(resumed)
    # Interrupted after its last checkpoint: nothing is left to train, only to evaluate.
    evaluated = run_alone(config, dataset, tmp_path / "uninterrupted")
    heldout = {
        name: value
        for name, value in without_times(uninterrupted).items()
        if name.startswith("heldout_")
    }
    assert without_times(evaluated) == heldout


def loaded(run: Path) -> tuple[int, State]:
    found = Checkpointer(str(run), {}).load()
    assert found is not None
    return found


def flat(state: State) -> dict[str, Any]:
    found = {
        f"{part}.{name}": value for part, values in state.items() for name, value in values.items()
    }
    return {
        name: value.values if isinstance(value, Shard) else value for name, value in found.items()
    }


def assert_equal(one: State, two: State) -> None:
    left, right = flat(one), flat(two)
    assert left.keys() == right.keys()
    different = [
        name
        for name, value in left.items()
        if not torch.equal(torch.as_tensor(right[name]), torch.as_tensor(value))
    ]
    assert not different


CADENCE = {"gan.critic_steps": 3, "model.norm": "batch"}
UPDATES = 8  # of both nets: two rounds
CUTS = (1, 3, 6)  # between critic updates, and before a generator update


def resume_at_cuts(strategy_name: str, source: Path, root: Path) -> dict[int, State]:
    """A worker's state after UPDATES, resumed from a checkpoint after each of CUTS, and
    uninterrupted (0)."""
    parallel = {**STRATEGIES[strategy_name], "parallel.workers": 2, "batch.micro_size": 8}
    config = config_of("conditional", source, **CADENCE, **parallel)
    dataset = images.prepare(config.data, str(root), True)
    train = Images(dataset, "train", config.data.size)
    strategy = backends.build(config)
    uninterrupted, step = GanTrainer(config, net_config(config, dataset), strategy), 0
    checkpointers = {
        cut: Checkpointer(str(root / f"{strategy_name}-{cut}"), config.model_dump(), strategy.name)
        for cut in CUTS
    }
    for number in range(UPDATES):
        if number in CUTS:
            checkpointers[number].save(step, uninterrupted.state())
            checkpointers[number].join()
        step = advance(uninterrupted, train, step)
    states = {0: copy.deepcopy(uninterrupted.state())}
    for cut, checkpoints in checkpointers.items():
        found = checkpoints.load()
        assert found is not None
        step, saved = found
        resumed = GanTrainer(config, uninterrupted.net_config, backends.build(config), saved)
        for _ in range(UPDATES - cut):
            step = advance(resumed, train, step)
        states[cut] = copy.deepcopy(resumed.state())
    return states


@pytest.mark.parametrize("strategy_name", STRATEGIES)
@pytest.mark.parametrize("cut", CUTS)
def test_two_workers_resume_after_any_update(
    strategy_name: str, cut: int, two_workers: Path
) -> None:
    for rank in range(2):
        states = torch.load(two_workers / f"resumed{rank}.pt", weights_only=False)[strategy_name]
        assert_equal(states[0], states[cut])


@pytest.mark.parametrize("cut", range(UPDATES))
def test_single_process_resumes_after_any_update(cut: int, source: Path, tmp_path: Path) -> None:
    config = config_of("conditional", source, **CADENCE)
    uninterrupted, train = single(config, tmp_path)
    step = 0
    for number in range(UPDATES):
        if number == cut:
            checkpoints = Checkpointer(str(tmp_path / "run"), config.model_dump())
            checkpoints.save(step, uninterrupted.state())
            checkpoints.join()
        step = advance(uninterrupted, train, step)
    step, state = loaded(tmp_path / "run")
    resumed = GanTrainer(config, uninterrupted.net_config, Ddp(), state)
    for _ in range(UPDATES - cut):
        step = advance(resumed, train, step)
    assert_equal(uninterrupted.state(), resumed.state())


def test_changed_critic_steps_continue_with_the_next_images(source: Path, tmp_path: Path) -> None:
    first, train = single(config_of("plain", source), tmp_path)
    step = 0
    while step < 2:
        step = advance(first, train, step)
    config = config_of("plain", source, **{"gan.critic_steps": 4})
    changed = GanTrainer(config, first.net_config, Ddp(), first.state())
    assert (changed.critic_updates, changed.critic_updates_in_step) == (4, 0)
    while step < 3:
        step = advance(changed, train, step)
    assert changed.critic_updates == 8


def test_final_metrics_include_every_metric_of_quality(source: Path, tmp_path: Path) -> None:
    config = config_of("plain", source, steps=2)
    final = run_alone(config, prepared(config, tmp_path), tmp_path / "run")
    assert final is not None
    metrics = (
        "frechet_distance",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "modes",
        "mode_kl",
        "sliced_wasserstein",
    )
    assert final.keys() >= {
        f"heldout_{metric}{suffix}" for metric in metrics for suffix in ("", "_baseline")
    }
    assert final.keys() >= {"heldout_samples", "wasserstein_distance", "real_score", "fake_score"}
    assert final["heldout_samples"] == 12


# ---- the parts of a step


def test_update_changes_one_net_only(source: Path, tmp_path: Path) -> None:
    trainer, train = single(config_of("plain", source), tmp_path)

    def changed_by(update: Callable[[], object]) -> set[str]:
        before = {
            part: {name: value.clone() for name, value in trainer.state()[part].items()}
            for part in NETS
        }
        update()
        after = trainer.state()
        return {
            part
            for part in NETS
            if any(
                not torch.equal(after[part][name], value) for name, value in before[part].items()
            )
        }

    critic_batches = trainer.critic_batches(0, train)
    assert changed_by(lambda: trainer.update_critic(critic_batches)) == {"critic"}
    generator_batches = trainer.generator_batches(0)
    assert changed_by(lambda: trainer.update_generator(generator_batches)) == {"generator"}
    assert changed_by(lambda: trainer.average.update(0)) == {"generator_ema"}
    assert all(
        parameter.grad is None
        for parameter in [*trainer.critic.model.parameters(), *trainer.generator.model.parameters()]
    )


def test_penalty_pulls_the_gradient_norm_to_one(source: Path, tmp_path: Path) -> None:
    """With a huge weight, the penalty alone determines the critic's updates."""
    config = config_of("plain", source, **{"gan.penalty_weight": 1e4, "optim.lr": 3e-3})
    trainer, train = single(config, tmp_path)
    penalties = [
        float(trainer.update_critic(trainer.critic_batches(update, train))["gradient_penalty"])
        for update in range(60)
    ]
    assert penalties[0] > 0.5
    assert max(penalties[-5:]) < 0.05


def test_noise_is_a_function_of_position_and_purpose(source: Path, tmp_path: Path) -> None:
    trainer, train = single(config_of("conditional", source), tmp_path)

    def critic_batch(update: int) -> Batch:
        return trainer.critic_batches(update, train)[0]

    critic, again, generator = critic_batch(2), critic_batch(2), trainer.generator_batches(2)[0]
    for name in ("latents", "real", "mix"):
        assert torch.equal(getattr(critic, name), getattr(again, name)), name
    latents = torch.cat([critic.latents, generator.latents, critic_batch(3).latents])
    assert len(latents.unique(dim=0)) == len(latents)


def test_average_decays_faster_in_the_first_updates(source: Path, tmp_path: Path) -> None:
    trainer, _ = single(config_of("plain", source, **{"model.ema_decay": 0.999}), tmp_path)
    for parameter in trainer.generator.model.parameters():
        torch.nn.init.ones_(parameter)
    averages = trainer.average.values.values()
    for value in averages:
        value.zero_()
    trainer.average.update(0)  # decay 1 / 10
    assert all(torch.allclose(value, torch.tensor(0.9)) for value in averages)
    trainer.average.update(10**6)
    assert all(torch.allclose(value, torch.tensor(0.9001)) for value in averages)


def test_samples_are_deterministic_and_have_one_class_per_row(source: Path, tmp_path: Path) -> None:
    sampler = Sampler(*single(config_of("conditional", source), tmp_path))
    for draw in (sampler.generated, sampler.real):
        assert draw().shape == (2 * 30 + 2, 10 * 30 + 2, 3)
        assert draw().dtype == np.uint8
        assert np.array_equal(draw(), draw())
    bright, dark = split_sheet(sampler.real(), 10, GUTTER)
    assert dark.mean() < 80 < 170 < bright.mean()
    interpolated = split_sheet(sampler.interpolated(), 10, GUTTER)
    assert interpolated.shape[:2] == (10, 10)
    # Both start with the first latent, in the first class.
    generated = split_sheet(sampler.generated(), 10, GUTTER)
    assert np.array_equal(interpolated[0, 0], generated[0, 0])


# ---- alarms


def collapse(rank: int, source: Path, root: Path, on_collapse: str) -> None:
    """Train on one of two workers with a recall that falls from 0.9 to 0; write the alarms, the
    evaluated steps and how the run ended."""
    values = {"parallel.workers": 2, "log.eval_every": 1, "gan.on_collapse": on_collapse}
    config = config_of("plain", source, steps=4, **values)
    recall = iter([0.9, 0.9, 0.0, 0.0])
    evaluate = Evaluator.__call__

    def evaluate_collapse(self: Evaluator, generate: Callable[[Any], Tensor]) -> dict[str, float]:
        return evaluate(self, generate) | {
            "heldout_recall": next(recall),
            "heldout_recall_baseline": 0.95,
            "heldout_samples": 1000.0,
        }

    Evaluator.__call__ = evaluate_collapse  # type: ignore[method-assign]  # in a spawned worker
    worker, recorder = recorded_worker(config, root)
    try:
        loop.train(worker, None)
        end = "complete"
    except Halt as halt:
        end = str(halt)
    alarms = [(step, kind) for step, kind, _ in recorder.alarms if kind == "collapse"]
    evaluated = [row["step"] for row in recorder.rows if "heldout_recall" in row]
    result = {"alarms": alarms, "end": end, "evaluated": evaluated}
    (root / f"{rank}.json").write_text(json.dumps(result))


def recorded_worker(
    config: GanConfig, root: Path, dataset: Dataset | None = None
) -> tuple[workers.LocalWorker, workers.MemoryRecorder]:
    recorder = workers.MemoryRecorder()
    checkpoints = Checkpointer(str(root / "run"), {})
    dataset = dataset or prepared(config, root)
    return workers.LocalWorker(config, Ddp(), checkpoints, recorder, dataset), recorder


@pytest.mark.parametrize("on_collapse", ["warn", "stop"])
def test_collapse_is_recorded_and_stops_every_worker_where_the_config_says_so(
    on_collapse: str, source: Path, tmp_path: Path
) -> None:
    images.prepare(config_of("plain", source).data, str(tmp_path))
    workers.spawn(2, collapse, source, tmp_path, on_collapse)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["alarms"] == [[3, "collapse"]]
    stopped = (
        "collapse at step 3 (gan.on_collapse is stop): heldout_recall fell from 0.9 at step 1 to 0 "
    )
    assert first["end"].startswith(stopped if on_collapse == "stop" else "complete")
    expected = [1, 2, 3] if on_collapse == "stop" else [1, 2, 3, 4]
    assert first["evaluated"] == expected, "the evaluation that ends a run is recorded"


def test_damaged_extractor_halts_the_run(source: Path, tmp_path: Path) -> None:
    config = config_of("plain", source, steps=2)
    dataset = prepared(config, tmp_path)
    assert dataset.extractor is not None
    file = Path(dataset.extractor["uri"])
    file.write_bytes(file.read_bytes()[:-1])
    worker, _ = recorded_worker(config, tmp_path, dataset)
    with pytest.raises(Halt, match=r"is damaged"):
        loop.train(worker, None)


def test_nan_loss_is_an_alarm_and_ends_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("plain", source, **{"steps": 4, "log.every": 1})
    worker, recorder = recorded_worker(config, tmp_path)
    nan = {"generator_loss": torch.tensor(torch.nan)}
    monkeypatch.setattr(GanTrainer, "update_generator", lambda self, batches: nan)
    with pytest.raises(Halt, match=r"generator_loss is nan at step 1"):
        loop.train(worker, None)
    message = (
        "generator_loss is nan: training has diverged; start another run with a lower optim.lr"
    )
    assert recorder.alarms == [(1, "divergence", message)]


def test_bfloat16_losses_are_close_to_those_of_fp32(source: Path, tmp_path: Path) -> None:
    config = config_of("conditional", source, **{"parallel.precision": "bf16"})
    dataset = images.prepare(config.data, str(tmp_path), True)
    train = train_images(config, dataset)
    losses = []
    for precision in ("bf16", "fp32"):
        trainer = GanTrainer(config, net_config(config, dataset), Ddp(precision))
        critic = trainer.update_critic(trainer.critic_batches(0, train))
        losses.append(critic | trainer.update_generator(trainer.generator_batches(0)))
    rounded, exact = losses
    for name, value in exact.items():
        assert 0 < abs(float(rounded[name] - value)) < 0.05 * max(1.0, abs(float(value))), name


# ---- on Ray


@pytest.mark.usefixtures("ray_address")
def test_two_ray_workers_train_as_one_process(source: Path, tmp_path: Path) -> None:
    intervals = ("log.every", "log.eval_every", "log.sample_every", "checkpoint.every")
    more = {"run.name": "two", "steps": 4, **dict.fromkeys(intervals, 2)}
    config = config_of("conditional", source, **more, **{"parallel.workers": 2})
    dataset = prepared(config, tmp_path)
    summary = fit(config, str(tmp_path), quiet=True)
    run = tmp_path / "runs" / "two"
    assert dataset.uri.endswith(f"/{summary['dataset']}")
    evaluated = [row for row in records.metrics(str(run)) if "heldout_sliced_wasserstein" in row]
    assert [row["step"] for row in evaluated] == [2, 4]
    assert {file.name for file in (run / "samples").glob("*.png")} == {
        "images_000002.png",
        "images_000004.png",
        "interpolation_000002.png",
        "interpolation_000004.png",
        "real_000002.png",
    }
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = board.Tags()["images"]
    steps = {tag: [event.step for event in board.Images(tag)] for tag in tags}
    assert steps == {"images": [2, 4], "interpolation": [2, 4], "real": [2]}
    manifest = complete(str(run))[0]
    json_files = {"alarms.json", "gan_cadence.json"}
    json_files |= {f"{part}_progress.json" for part in ("generator", "critic")}
    files = {f"{part}.safetensors" for part in PARTS} | json_files
    assert (manifest.step, manifest.world_size, set(manifest.files)) == (4, 2, files)

    run_alone(config_of("conditional", source, **more), dataset, tmp_path / "alone")
    _, alone = loaded(tmp_path / "alone")
    _, together = loaded(run)
    for part in NETS:
        for name, value in alone[part].items():
            assert torch.allclose(value, together[part][name], atol=1e-5), (part, name)
    assert json.loads((run / "summary.json").read_text())["metrics"] == summary["metrics"]

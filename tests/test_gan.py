"""GAN training is the same at any number of workers, resumes to the bit, and runs on Ray."""

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

from cluster import storage
from models.nets.features import Extractor, ExtractorConfig
from tests.support import workers
from train.config.loader import load
from train.data import images
from train.gan import extractor
from train.gan import loop as gan
from train.gan.config import GanConfig
from train.gan.film import cells
from train.gan.trainer import GanTrainer, net_config
from train.launch import fit
from train.parallel import backends, zero
from train.parallel.state import Halt, Shard, State
from train.parallel.strategy import Ddp
from train.run import records
from train.run.checkpoint import Checkpointer, complete, newest

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
    "colour": {"data.size": 32, "data.channels": 3},
}


def config_of(variant: str, source: Path, **more: Any) -> GanConfig:
    values = {**SMALL, **VARIANTS[variant], **more}
    config = load(
        "gan",
        None,
        {
            **values,
            "data.source": [
                str(source / ("colour" if values.get("data.channels") == 3 else "grey"))
            ],
        },
    )
    assert isinstance(config, GanConfig)
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures in two classes, grey and in colour."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for kind, channels in (("grey", 1), ("colour", 3)):
        for index in range(120):
            folder = root / kind / ("bright" if index % 2 else "dark")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(
                128 * (index % 2), 128 + 127 * (index % 2), (40, 36, channels), np.uint8
            )
            Image.fromarray(pixels.squeeze()).save(folder / f"{index}.png")
    return root


# ---------------------------------------------------------------- equality

# norms x strategies x objectives x precisions; and what a GAN may be beside that.
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
# Largest difference of a gradient and of a parameter. bfloat16 rounds other sums where the batch is split, and Adam makes whole steps
# of it: there it is the norm of the first gradients' difference, relative to theirs.
TOLERANCES = {"fp32": 1e-5, "fp64": 1e-12, "bf16": 0.05}
ONCE = {"gan.critic_steps": 1, "steps": 1}
MATRIX = [
    f"{norm} {objective} {precision} {strategy}"
    for norm, objective, precision, strategy in itertools.product(
        NORMS, OBJECTIVES, PRECISIONS, STRATEGIES
    )
]
MATRIX += [f"{variant} wgan-gp {precision} {strategy}" for variant, precision, strategy in itertools.product(["conditional", "accumulated", "colour"], PRECISIONS, ["ddp", "zero1"])]  # fmt: skip

NETS, OPTIMIZERS = (
    ("generator", "generator_ema", "critic"),
    ("generator_optimizer", "critic_optimizer"),
)
PARTS = (*NETS, *OPTIMIZERS)
Tensors = dict[str, Tensor]


def config_of_cell(cell: str, source: Path, workers: int) -> GanConfig:
    kind, objective, precision, strategy = cell.split()
    values = {
        "gan.objective": objective,
        "parallel.precision": "bf16" if precision == "bf16" else "fp32",
        "parallel.workers": workers,
    }
    values |= ONCE if precision == "bf16" else {}
    more = NORMS.get(kind, {}) | (
        STRATEGIES[strategy] if workers > 1 else {"batch.micro_size": 16}
    )  # alone, nothing is accumulated
    return config_of("plain" if kind in NORMS else kind, source, **values, **more)


def after_training(cell: str, source: Path, root: Path, workers: int) -> State:
    """What a checkpoint would hold after STEPS generator steps on this process's share of the work, and the initial weights."""
    config = config_of_cell(cell, source, workers)
    torch.set_num_threads(1)
    torch.set_default_dtype(PRECISIONS[cell.split()[2]])
    try:
        pictures = images.Images(
            images.prepare(config.data, str(root)),
            "train",
            config.data.size,
            config.data.horizontal_flip,
        )
        trained = GanTrainer(config, net_config(config, pictures), backends.build(config))
        before = copy.deepcopy(trained.state())
        for step in range(config.steps):
            while trained.turn < config.gan.critic_steps:
                trained.update_critic(trained.critic_batches(trained.critic_updates, pictures))
            trained.update_generator(trained.generator_batches(step))
            trained.average.update(step)
        return {"before": before, **copy.deepcopy(trained.state())}
    finally:
        torch.set_default_dtype(torch.float32)


def train_together(rank: int, source: Path, root: Path) -> None:
    torch.save(
        {strategy: resumed_anywhere(strategy, source, root) for strategy in STRATEGIES},
        root / f"resumed{rank}.pt",
    )
    _let_deepspeed_take_doubles()
    found = {cell: after_training(cell, source, root, 2) for cell in MATRIX}
    torch.save(found, root / f"rank{rank}.pt")


def _let_deepspeed_take_doubles() -> None:
    """DeepSpeed exchanges gradients, and keeps ZeRO's copy of the weights, in fp32: behind its rounding an error of ours could hide."""
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
        found["zero_optimization"]["reduce_scatter"] = (
            torch.get_default_dtype() == torch.float32
        )  # has no float64
        return found

    zero.DeepSpeed.settings = with_doubles  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def two_workers(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they did together."""
    root = tmp_path_factory.mktemp("two")
    for kind in ("plain", "conditional", "colour"):
        images.prepare(config_of(kind, source).data, str(root), kind == "conditional")
    workers.spawn(2, train_together, source, root)
    return root


@pytest.fixture(scope="module")
def by_two_workers(two_workers: Path) -> dict[str, State]:
    """Every cell of the matrix as two workers leave it, shares put together; that both hold the same weights is seen to here."""
    first, second = (
        torch.load(two_workers / f"rank{rank}.pt", weights_only=False) for rank in range(2)
    )
    for cell, part in itertools.product(MATRIX, NETS):
        for name, value in first[cell][part].items():
            assert torch.equal(second[cell][part][name], value), (cell, part, name)
    for cell in MATRIX:
        for part in OPTIMIZERS:
            first[cell][part] = whole(first[cell][part], second[cell][part])
    return first


def whole(*shares: dict[str, Tensor | Shard]) -> Tensors:
    """Tensors of which each worker has a share, or all."""
    found: Tensors = {}
    for share in shares:
        for name, value in share.items():
            if isinstance(value, Shard):
                target = found.setdefault(
                    name, torch.full(value.shape, torch.nan, dtype=value.values.dtype)
                ).view(-1)
                target[value.start : value.start + len(value.values)] = value.values
            else:
                found[name] = value
    return found


@pytest.fixture(scope="module")
def by_one_process(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], State]:
    root = tmp_path_factory.mktemp("one")
    return functools.cache(lambda cell: after_training(cell, source, root, 1))


@pytest.mark.parametrize("cell", MATRIX)
def test_two_workers_have_the_gradients_and_end_where_one_process_does(
    cell: str, by_two_workers: dict[str, State], by_one_process: Callable[[str], State]
) -> None:
    kind, objective, precision, _ = cell.split()
    alone, together = by_one_process(f"{kind} {objective} {precision} ddp"), by_two_workers[cell]
    for part in OPTIMIZERS if precision == "bf16" else PARTS:
        one, two = compared(alone, part), compared(together, part)
        difference = (
            norm(apart(one, two)) / norm(one) if precision == "bf16" else largest(apart(one, two))
        )
        assert difference < TOLERANCES[precision], (part, difference)
        assert norm(one) > 1e-2, "nothing was learned, so nothing was compared"


def compared(state: State, part: str) -> Tensors:
    """Of a net or its average what it moved by; of an optimizer the last gradient: Adam's first moment, since beta1 is 0."""
    if part.endswith("_optimizer"):
        return {name: value for name, value in state[part].items() if name.startswith("exp_avg/")}
    return {name: value - state["before"][part][name] for name, value in state[part].items()}


def apart(one: Tensors, two: Tensors) -> Tensors:
    assert one.keys() == two.keys()
    return {name: two[name] - value for name, value in one.items()}


def largest(values: Tensors) -> float:
    return max(float(value.abs().max()) for value in values.values())


def norm(values: Tensors) -> float:
    return float(torch.stack([value.double().norm() for value in values.values()]).norm())


# ---------------------------------------------------------------- resume


class Stop(Exception):
    pass


class Interrupting(NullRecorder):
    """Ends the loop as a kill would, in the middle of a step's aftermath."""

    def __init__(self, at: int) -> None:
        self.at = at

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step == self.at:
            raise Stop


def judged_by(config: GanConfig, dataset: str) -> str:
    """An extractor that has learned nothing: what it sees is the same each time."""
    torch.manual_seed(0)
    untrained = Extractor(
        ExtractorConfig(size=32, channels=config.data.channels, num_classes=2)
    ).eval()
    return extractor.publish(
        extractor.pack(untrained, extractor.Card("classes", 0.5, 12, 108, ["dark", "bright"], "")),
        dataset,
        config.data.size,
    )


def run_alone(
    config: GanConfig, dataset: str, run_uri: Path, stop_at: int | None = None
) -> dict[str, Any] | None:
    checkpoints = Checkpointer(str(run_uri), config.model_dump())
    recorder = NullRecorder() if stop_at is None else Interrupting(stop_at)
    try:
        return gan.train(
            workers.LocalWorker(
                config, Ddp(), checkpoints, recorder, dataset, judged_by(config, dataset)
            ),
            checkpoints.load(),
        )
    except Stop:
        checkpoints.join()
        return None


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(
    source: Path, tmp_path: Path
) -> None:
    config = config_of(
        "conditional",
        source,
        **{"steps": 6, "checkpoint.every": 2, "log.every": 1, "log.eval_every": 3},
    )
    dataset = images.prepare(config.data, str(tmp_path))
    straight = run_alone(config, dataset, tmp_path / "straight")
    assert run_alone(config, dataset, tmp_path / "broken", stop_at=5) is None
    assert newest(str(tmp_path / "broken")).step == 4  # type: ignore[union-attr]
    resumed = run_alone(config, dataset, tmp_path / "broken")

    states = []
    for run in ("straight", "broken"):
        step, state = Checkpointer(str(tmp_path / run), {}).load()  # type: ignore[misc]
        assert step == 6
        states.append(state)
    tensors = {"generator", "generator_ema", "critic", "generator_optimizer", "critic_optimizer"}
    progress = {"generator_progress", "critic_progress", "gan_progress", "alarms"}
    assert set(states[0]) == tensors | progress
    for part in tensors:
        assert all(
            torch.equal(value, states[1][part][name]) for name, value in states[0][part].items()
        ), part
    for part in progress:
        assert states[0][part] == states[1][part]
    assert straight is not None
    assert resumed is not None
    assert {tag: value for tag, value in straight.items() if not tag.endswith("_s")} == {
        tag: value for tag, value in resumed.items() if not tag.endswith("_s")
    }
    # Interrupted after its last checkpoint: nothing is left to train, and it is judged as it would have been.
    judged = run_alone(config, dataset, tmp_path / "straight")
    assert judged is not None
    assert {tag: value for tag, value in judged.items() if not tag.endswith("_s")} == {
        tag: value for tag, value in straight.items() if tag.startswith("heldout_")
    }


def advance(trained: Gan, pictures: images.Images, step: int) -> int:
    """One update of the net whose turn it is; the generator's steps so far."""
    if trained.turn < trained.config.gan.critic_steps:
        trained.update_critic(trained.critic_batches(trained.critic_updates, pictures))
        return step
    trained.update_generator(trained.generator_batches(step))
    trained.average.update(step)
    return step + 1


def flat(state: State) -> dict[str, Any]:
    found = {
        f"{part}.{name}": value for part, values in state.items() for name, value in values.items()
    }
    return {
        name: value.values if isinstance(value, Shard) else value for name, value in found.items()
    }


def assert_same(one: State, two: State) -> None:
    left, right = flat(one), flat(two)
    assert left.keys() == right.keys()
    different = [
        name
        for name, value in left.items()
        if not torch.equal(torch.as_tensor(right[name]), torch.as_tensor(value))
    ]
    assert not different


CADENCE = {"gan.critic_steps": 3, "model.norm": "batch"}
UPDATES = 8  # of either net: two rounds
CUTS = (1, 3, 6)  # beside a round's end: the critic is at work, or the generator's turn has come


def resumed_anywhere(strategy_name: str, source: Path, root: Path) -> dict[int, State]:
    """A worker's state after UPDATES, reached from a checkpoint after each of CUTS, and (0) without one."""
    config = config_of(
        "conditional",
        source,
        **CADENCE,
        **STRATEGIES[strategy_name],
        **{"parallel.workers": 2, "batch.micro_size": 8},
    )
    pictures = images.Images(
        images.prepare(config.data, str(root), True), "train", config.data.size
    )
    spread = backends.build(config)
    straight, step = GanTrainer(config, net_config(config, pictures), spread), 0
    kept = {
        cut: Checkpointer(str(root / f"{strategy_name}-{cut}"), config.model_dump(), spread.name)
        for cut in CUTS
    }
    for number in range(UPDATES):
        if number in CUTS:
            kept[number].save(step, straight.state())
            kept[number].join()
        step = advance(straight, pictures, step)
    found = {0: copy.deepcopy(straight.state())}
    for cut, checkpoints in kept.items():
        step, saved = checkpoints.load()  # type: ignore[misc]
        resumed = GanTrainer(config, straight.shape, backends.build(config), saved)
        for _ in range(UPDATES - cut):
            step = advance(resumed, pictures, step)
        found[cut] = copy.deepcopy(resumed.state())
    return found


@pytest.mark.parametrize("strategy_name", STRATEGIES)
@pytest.mark.parametrize("cut", CUTS)
def test_two_workers_resume_from_anywhere_in_the_cadence(
    strategy_name: str, cut: int, two_workers: Path
) -> None:
    for rank in range(2):
        found = torch.load(two_workers / f"resumed{rank}.pt", weights_only=False)[strategy_name]
        assert_same(found[0], found[cut])


@pytest.mark.parametrize("updates", range(UPDATES))
def test_a_checkpoint_may_fall_anywhere_in_the_cadence(
    updates: int, source: Path, tmp_path: Path
) -> None:
    config = config_of("conditional", source, **CADENCE)
    straight, pictures = single(config, tmp_path)
    step = 0
    for number in range(UPDATES):
        if number == updates:
            checkpoints = Checkpointer(str(tmp_path / "run"), config.model_dump())
            checkpoints.save(step, straight.state())
            checkpoints.join()
        step = advance(straight, pictures, step)
    step, state = Checkpointer(str(tmp_path / "run"), {}).load()  # type: ignore[misc]
    resumed = GanTrainer(config, straight.shape, Ddp(), state)
    for _ in range(UPDATES - updates):
        step = advance(resumed, pictures, step)
    assert_same(straight.state(), resumed.state())


def test_another_critic_ratio_goes_on_with_the_next_pictures(source: Path, tmp_path: Path) -> None:
    config = config_of("plain", source)
    first, pictures = single(config, tmp_path)
    step = 0
    while step < 2:
        step = advance(first, pictures, step)
    faster = GanTrainer(
        config_of("plain", source, **{"gan.critic_steps": 4}), first.shape, Ddp(), first.state()
    )
    assert (faster.critic_updates, faster.turn) == (4, 0)
    while step < 3:
        step = advance(faster, pictures, step)
    assert faster.critic_updates == 8


def test_final_metrics_have_every_figure_of_quality(source: Path, tmp_path: Path) -> None:
    config = config_of("plain", source, steps=2)
    final = run_alone(config, images.prepare(config.data, str(tmp_path)), tmp_path / "run")
    assert final is not None
    figures = (
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
        f"heldout_{figure}{suffix}" for figure in figures for suffix in ("", "_baseline")
    }
    assert final.keys() >= {"heldout_samples", "wasserstein_distance", "real_score", "fake_score"}
    assert final["heldout_samples"] == 12


# ---------------------------------------------------------------- the parts of a step


def single(config: GanConfig, tmp_path: Path) -> tuple[Gan, images.Images]:
    pictures = images.Images(images.prepare(config.data, str(tmp_path)), "train", config.data.size)
    return GanTrainer(config, net_config(config, pictures), Ddp()), pictures


def test_an_update_moves_its_own_net_alone(source: Path, tmp_path: Path) -> None:
    trained, pictures = single(config_of("plain", source), tmp_path)

    def moved(before: dict[str, Any]) -> set[str]:
        now = trained.state()
        return {
            part
            for part in ("generator", "critic", "generator_ema")
            if any(not torch.equal(now[part][name], before[part][name]) for name in now[part])
        }

    def copied() -> dict[str, Any]:
        return {
            part: {name: value.clone() for name, value in trained.state()[part].items()}
            for part in ("generator", "critic", "generator_ema")
        }

    before = copied()
    trained.update_critic(trained.critic_batches(0, pictures))
    assert moved(before) == {"critic"}
    before = copied()
    trained.update_generator(trained.generator_batches(0))
    assert moved(before) == {"generator"}
    before = copied()
    trained.average.update(0)
    assert moved(before) == {"generator_ema"}
    assert all(
        parameter.grad is None
        for parameter in [*trained.critic.core.parameters(), *trained.generator.core.parameters()]
    )


def test_the_penalty_reaches_the_critic(source: Path, tmp_path: Path) -> None:
    """With a huge weight, critic updates are nothing but a pull of the gradient's norm to 1."""
    config = config_of("plain", source, **{"gan.penalty_weight": 1e4, "optim.lr": 3e-3})
    trained, pictures = single(config, tmp_path)
    penalties = [
        float(trained.update_critic(trained.critic_batches(update, pictures))["gradient_penalty"])
        for update in range(60)
    ]
    assert penalties[0] > 0.5
    assert max(penalties[-5:]) < 0.05


def test_noise_is_a_function_of_position_and_purpose(source: Path, tmp_path: Path) -> None:
    trained, pictures = single(config_of("conditional", source), tmp_path)
    critic, generator = trained.critic_batches(2, pictures)[0], trained.generator_batches(2)[0]
    again = trained.critic_batches(2, pictures)[0]
    assert torch.equal(critic.latents, again.latents)
    assert torch.equal(critic.real, again.real)  # type: ignore[arg-type]
    assert torch.equal(critic.mix, again.mix)  # type: ignore[arg-type]
    rows = torch.cat(
        [critic.latents, generator.latents, trained.critic_batches(3, pictures)[0].latents]
    )
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_average_follows_num_updates_at_first(source: Path, tmp_path: Path) -> None:
    trained, _ = single(config_of("plain", source, **{"model.ema_decay": 0.999}), tmp_path)
    for parameter in trained.generator.core.parameters():
        torch.nn.init.ones_(parameter)
    for value in trained.average.values.values():
        value.zero_()
    trained.average.update(0)  # decay 1 / 10
    assert all(
        torch.allclose(parameter, torch.tensor(0.9))
        for parameter in trained.average.values.values()
    )
    trained.average.update(10**6)
    assert all(
        torch.allclose(parameter, torch.tensor(0.9001))
        for parameter in trained.average.values.values()
    )


def test_pictures_are_the_same_each_time_and_one_row_a_class(source: Path, tmp_path: Path) -> None:
    trained, pictures = single(config_of("conditional", source), tmp_path)
    for draw in (trained.grid, lambda: trained.real(pictures)):
        assert draw().shape == (2 * 30 + 2, 10 * 30 + 2, 3)
        assert draw().dtype == np.uint8
        assert np.array_equal(draw(), draw())
    bright, dark = cells(trained.real(pictures), 10)
    assert dark.mean() < 80 < 170 < bright.mean()
    walks = cells(trained.walks(), 10)
    assert walks.shape[:2] == (10, 10)
    # Rows 0 and 2 are of one class: the one ends on latent 1, where row 1, of the other class, begins.
    assert np.array_equal(walks[0, 0], cells(trained.grid(), 10)[0, 0])


# ---------------------------------------------------------------- alarms


def collapsing(rank: int, source: Path, root: Path, on_collapse: str) -> None:
    """Trains two workers whose generator is seen to collapse: recall goes from 0.9 to 0. Leaves each one's alarms and end."""
    config = config_of(
        "plain",
        source,
        **{"parallel.workers": 2, "steps": 4, "log.eval_every": 1, "gan.on_collapse": on_collapse},
    )
    recorder = workers.MemoryRecorder()
    falling = iter([0.9, 0.9, 0.0, 0.0])
    judge = gan.Evaluator.__call__

    def judged(self: Any, generate: Any) -> dict[str, float]:
        return judge(self, generate) | {
            "heldout_recall": next(falling),
            "heldout_recall_baseline": 0.95,
            "heldout_samples": 1000.0,
        }

    gan.Evaluator.__call__ = judged  # type: ignore[method-assign]
    dataset = images.prepare(config.data, str(root))
    worker = workers.LocalWorker(
        config,
        Ddp(),
        Checkpointer(str(root / "run"), {}),
        recorder,
        dataset,
        judged_by(config, dataset),
    )
    try:
        gan.train(worker, None)
        end = "reached"
    except Halt as sentence:
        end = str(sentence)
    alarms = [(step, kind) for step, kind, _ in recorder.alarms if kind == "collapse"]
    on_record = [row["step"] for row in recorder.rows if "heldout_recall" in row]
    (root / f"{rank}.json").write_text(
        json.dumps({"alarms": alarms, "end": end, "judged": on_record})
    )


@pytest.mark.parametrize("on_collapse", ["warn", "stop"])
def test_a_collapse_is_put_down_and_stops_every_worker_where_that_is_asked_for(
    on_collapse: str, source: Path, tmp_path: Path
) -> None:
    images.prepare(config_of("plain", source).data, str(tmp_path))
    workers.spawn(2, collapsing, source, tmp_path, on_collapse)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["alarms"] == [[3, "collapse"]]
    stopped = (
        "collapse at step 3 (gan.on_collapse is stop): heldout_recall fell from 0.9 at step 1 to 0 "
    )
    assert found[0]["end"].startswith(stopped if on_collapse == "stop" else "reached")
    assert found[0]["judged"] == ([1, 2, 3] if on_collapse == "stop" else [1, 2, 3, 4]), (
        "the judgement that ends a run is on record"
    )


def test_what_rank_0_cannot_judge_by_is_said_once(source: Path, tmp_path: Path) -> None:
    config = config_of("plain", source, steps=2)
    dataset = images.prepare(config.data, str(tmp_path))
    judge = Path(judged_by(config, dataset))
    judge.write_bytes(judge.read_bytes()[:-1])
    with pytest.raises(Halt, match=r"is damaged"):
        gan.train(
            workers.LocalWorker(
                config,
                Ddp(),
                Checkpointer(str(tmp_path / "run"), {}),
                workers.MemoryRecorder(),
                dataset,
                str(judge),
            ),
            None,
        )


def test_nan_is_an_alarm_before_it_ends_the_run(source: Path, tmp_path: Path) -> None:
    config = config_of("plain", source, **{"steps": 4, "log.every": 1})
    recorder = workers.MemoryRecorder()
    dataset = images.prepare(config.data, str(tmp_path))
    worker = workers.LocalWorker(
        config,
        Ddp(),
        Checkpointer(str(tmp_path / "run"), {}),
        recorder,
        dataset,
        judged_by(config, dataset),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gan.Gan,
            "update_generator",
            lambda self, batches: {"generator_loss": torch.tensor(torch.nan)},
        )
        with pytest.raises(Halt, match=r"generator_loss is nan at step 1"):
            gan.train(worker, None)
    assert recorder.alarms == [(1, "divergence", "generator_loss is nan; use a lower optim.lr")]


def test_bfloat16_trains(source: Path, tmp_path: Path) -> None:
    config = config_of("conditional", source, **{"parallel.precision": "bf16"})
    pictures = single(config, tmp_path)[1]
    found = []
    for precision in ("bf16", "fp32"):
        trained = GanTrainer(config, net_config(config, pictures), Ddp(precision))
        found.append(
            trained.update_critic(trained.critic_batches(0, pictures))
            | trained.update_generator(trained.generator_batches(0))
        )
    rounded, exact = found
    for tag, value in exact.items():
        assert 0 < abs(float(rounded[tag] - value)) < 0.05 * max(1.0, abs(float(value))), tag


# ---------------------------------------------------------------- on Ray


def test_two_ray_workers_end_where_one_process_does(
    ray_address: str, source: Path, tmp_path: Path
) -> None:
    more = {
        "run.name": "two",
        "steps": 4,
        "log.every": 2,
        "log.eval_every": 2,
        "log.sample_every": 2,
        "checkpoint.every": 2,
    }
    config = config_of("conditional", source, **more, **{"parallel.workers": 2})
    judged_by(config, images.prepare(config.data, str(tmp_path)))
    summary = fit(config, str(tmp_path), quiet=True)
    run = tmp_path / "runs" / "two"
    assert [
        row["step"] for row in records.metrics(str(run)) if "heldout_sliced_wasserstein" in row
    ] == [2, 4]
    assert {file.name for file in (run / "samples").glob("*.png")} == {
        *(
            "pictures_000002.png",
            "pictures_000004.png",
            "interpolation_000002.png",
            "interpolation_000004.png",
            "real_000002.png",
        )
    }
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]} == {
        "pictures": [2, 4], "interpolation": [2, 4], "real": [2]
    }  # fmt: skip
    manifest = complete(str(run))[0]
    parts = {"generator", "generator_ema", "critic", "generator_optimizer", "critic_optimizer"}
    progress = {
        "alarms.json",
        *(f"{part}_progress.json" for part in ("gan", "generator", "critic")),
    }
    names = {f"{part}.safetensors" for part in parts} | progress
    assert (manifest.step, manifest.world_size, set(manifest.files)) == (4, 2, names)

    single_config = config_of("conditional", source, **more)
    run_alone(
        single_config, storage.join(str(tmp_path), "data", summary["dataset"]), tmp_path / "alone"
    )
    ours, theirs = (Checkpointer(str(where), {}).load()[1] for where in (tmp_path / "alone", run))  # type: ignore[index]
    for part in ("generator", "generator_ema", "critic"):
        for name, value in ours[part].items():
            assert torch.allclose(value, theirs[part][name], atol=1e-5), (part, name)
    assert json.loads((run / "summary.json").read_text())["metrics"] == summary["metrics"]

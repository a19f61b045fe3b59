"""GAN training is the same at any number of workers, resumes to the bit, and runs on Ray."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import workers
from PIL import Image
from torch import Tensor

from models import storage
from train import gan, images, metrics
from train.checkpoint import Checkpointer, complete, newest
from train.config import GanConfig, load
from train.gan import Gan, shape
from train.launch import fit
from train.strategy import Ddp

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
    folder = source / ("colour" if variant == "colour" else "grey")
    config = load("gan", None, {**SMALL, "data.source": [str(folder)], **VARIANTS[variant], **more})
    assert isinstance(config, GanConfig)
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures in two classes, grey and in colour."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for kind, channels in (("grey", 1), ("colour", 3)):
        for index in range(40):
            folder = root / kind / ("bright" if index % 2 else "dark")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(128 * (index % 2), 128 + 127 * (index % 2), (40, 36, channels), np.uint8)
            Image.fromarray(pixels.squeeze()).save(folder / f"{index}.png")
    return root


def parameters_after_training(config: GanConfig, dataset: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter and the averaged generator after STEPS generator steps, on this process's share of the work."""
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    try:
        pictures = images.Pictures(Path(dataset), "train", config.data.size, config.data.horizontal_flip)
        trained = Gan(config, shape(config, pictures.meta), Ddp())
        for step in range(STEPS):
            for turn in range(config.gan.critic_steps):
                trained.update_critic(trained.critic_batches(step * config.gan.critic_steps + turn, pictures))
            trained.update_generator(trained.generator_batches(step))
            trained.average.update(step)
        state = trained.state()
        return {f"{part}.{name}": value.clone() for part in ("generator", "generator_ema", "critic") for name, value in state[part].items()}
    finally:
        torch.set_default_dtype(torch.float32)


def worker_process(rank: int, source: Path, folder: Path) -> None:
    found = {}
    for variant in VARIANTS:
        config = config_of(variant, source, **{"parallel.workers": 2})
        dataset = images.prepare(config.data, str(folder))
        for dtype in (torch.float32, torch.float64):
            found[f"{variant} {dtype}"] = parameters_after_training(config, dataset, dtype)
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def two_workers(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two DDP processes holds after training every variant in both precisions."""
    folder = tmp_path_factory.mktemp("two")
    workers.spawn(2, worker_process, source, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_workers_end_where_one_does(
    variant: str, dtype: torch.dtype, tolerance: float, source: Path, two_workers: list[dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    config = config_of(variant, source, **{"batch.micro_size": 16})  # one process, one batch: nothing is accumulated
    alone = parameters_after_training(config, images.prepare(config.data, str(tmp_path)), dtype)
    before = Gan(config, shape(config, {"classes": ["a", "b"]}), Ddp()).state()
    moved = max(
        float((alone[f"{part}.{name}"] - value).abs().max()) for part in ("generator", "critic") for name, value in before[part].items()
    )
    assert moved > 1e-3, "nothing was learned, so nothing was compared"
    for rank, held in enumerate(two_workers):
        for name, value in alone.items():
            difference = float((held[f"{variant} {dtype}"][name] - value).abs().max())
            assert difference < tolerance, (rank, name, difference)


# ---------------------------------------------------------------- resume


class Stop(Exception):
    pass


class Interrupting(metrics.Silent):
    """Ends the loop as a kill would, in the middle of a step's aftermath."""

    def __init__(self, at: int) -> None:
        self.at = at

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step == self.at:
            raise Stop


def run_alone(config: GanConfig, dataset: str, run_uri: Path, stop_at: int | None = None) -> dict[str, Any] | None:
    checkpoints = Checkpointer(str(run_uri), config.model_dump())
    recorder = metrics.Silent() if stop_at is None else Interrupting(stop_at)
    try:
        return gan.train(workers.Alone(config, Ddp(), checkpoints, recorder, dataset), checkpoints.load())
    except Stop:
        checkpoints.join()
        return None


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(source: Path, tmp_path: Path) -> None:
    config = config_of("conditional", source, **{"steps": 6, "checkpoint.every": 2, "log.every": 1, "log.eval_every": 3})
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
    assert set(states[0]) == tensors | {"generator_progress", "critic_progress"}
    for part in tensors:
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items()), part
    for part in ("generator_progress", "critic_progress"):
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
        tag: straight[tag] for tag in ("heldout_sliced_wasserstein", "heldout_sliced_wasserstein_floor", "heldout_samples")
    }


def test_final_metrics_have_the_distance_and_its_floor(source: Path, tmp_path: Path) -> None:
    config = config_of("plain", source, steps=2)
    final = run_alone(config, images.prepare(config.data, str(tmp_path)), tmp_path / "run")
    assert final is not None
    assert final.keys() >= {"heldout_sliced_wasserstein", "heldout_sliced_wasserstein_floor", "heldout_samples", "wasserstein_distance"}
    assert final["heldout_samples"] == 4


# ---------------------------------------------------------------- the parts of a step


def single(config: GanConfig, tmp_path: Path) -> tuple[Gan, images.Pictures]:
    pictures = images.Pictures(Path(images.prepare(config.data, str(tmp_path))), "train", config.data.size)
    return Gan(config, shape(config, pictures.meta), Ddp()), pictures


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
    assert all(parameter.grad is None for parameter in [*trained.critic.core.parameters(), *trained.generator.core.parameters()])


def test_the_penalty_reaches_the_critic(source: Path, tmp_path: Path) -> None:
    """With a huge weight, critic updates are nothing but a pull of the gradient's norm to 1."""
    config = config_of("plain", source, **{"gan.penalty_weight": 1e4, "optim.lr": 3e-3})
    trained, pictures = single(config, tmp_path)
    penalties = [float(trained.update_critic(trained.critic_batches(update, pictures))["gradient_penalty"]) for update in range(60)]
    assert penalties[0] > 0.5
    assert max(penalties[-5:]) < 0.05


def test_noise_is_a_function_of_position_and_purpose(source: Path, tmp_path: Path) -> None:
    trained, pictures = single(config_of("conditional", source), tmp_path)
    critic, generator = trained.critic_batches(2, pictures)[0], trained.generator_batches(2)[0]
    again = trained.critic_batches(2, pictures)[0]
    assert torch.equal(critic.latents, again.latents)
    assert torch.equal(critic.real, again.real)  # type: ignore[arg-type]
    assert torch.equal(critic.mix, again.mix)  # type: ignore[arg-type]
    rows = torch.cat([critic.latents, generator.latents, trained.critic_batches(3, pictures)[0].latents])
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_average_follows_num_updates_at_first(source: Path, tmp_path: Path) -> None:
    trained, _ = single(config_of("plain", source, **{"model.ema_decay": 0.999}), tmp_path)
    for parameter in trained.generator.core.parameters():
        torch.nn.init.ones_(parameter)
    for value in trained.average.values.values():
        value.zero_()
    trained.average.update(0)  # decay 1 / 10
    assert all(torch.allclose(parameter, torch.tensor(0.9)) for parameter in trained.average.values.values())
    trained.average.update(10**6)
    assert all(torch.allclose(parameter, torch.tensor(0.9001)) for parameter in trained.average.values.values())


def test_the_grid_has_a_row_for_each_class(source: Path, tmp_path: Path) -> None:
    trained, _ = single(config_of("conditional", source), tmp_path)
    assert trained.grid().shape == (2 * 30 + 2, 10 * 30 + 2, 3)
    assert trained.grid().dtype == np.uint8
    assert np.array_equal(trained.grid(), trained.grid())


def test_bfloat16_trains(source: Path, tmp_path: Path) -> None:
    config = config_of("conditional", source, **{"parallel.precision": "bf16"})
    pictures = single(config, tmp_path)[1]
    trained = Gan(config, shape(config, pictures.meta), Ddp("bf16"))
    figures = trained.update_critic(trained.critic_batches(0, pictures)) | trained.update_generator(trained.generator_batches(0))
    assert all(torch.isfinite(value) for value in figures.values())
    assert figures["gradient_penalty"].dtype == torch.float32


# ---------------------------------------------------------------- on Ray


def test_two_ray_workers_end_where_one_process_does(ray_address: str, source: Path, tmp_path: Path) -> None:
    more = {"run.name": "two", "steps": 4, "log.every": 2, "log.eval_every": 2, "log.sample_every": 2, "checkpoint.every": 2}
    config = config_of("conditional", source, **more, **{"parallel.workers": 2})
    summary = fit(config, str(tmp_path), quiet=True)
    run = tmp_path / "runs" / "two"
    # Over this handful of pictures the floor is noise: which of the two is larger says nothing.
    assert min(summary["metrics"]["heldout_sliced_wasserstein"], summary["metrics"]["heldout_sliced_wasserstein_floor"]) > 0
    assert [row["step"] for row in metrics.read(str(run)) if "heldout_sliced_wasserstein" in row] == [2, 4]
    assert {file.name for file in (run / "samples").glob("*.png")} == {"pictures_000002.png", "pictures_000004.png"}
    manifest = complete(str(run))[0]
    parts = {"generator", "generator_ema", "critic", "generator_optimizer", "critic_optimizer"}
    names = {f"{part}.safetensors" for part in parts} | {"generator_progress.json", "critic_progress.json"}
    assert (manifest.step, manifest.world_size, set(manifest.files)) == (4, 2, names)

    single_config = config_of("conditional", source, **more)
    run_alone(single_config, storage.join(str(tmp_path), "data", summary["dataset"]), tmp_path / "alone")
    ours, theirs = (Checkpointer(str(where), {}).load()[1] for where in (tmp_path / "alone", run))  # type: ignore[index]
    for part in ("generator", "generator_ema", "critic"):
        for name, value in ours[part].items():
            assert torch.allclose(value, theirs[part][name], atol=1e-5), (part, name)
    assert json.loads((run / "summary.json").read_text())["metrics"] == summary["metrics"]

"""Every strategy, number of workers and accumulation trains the same model and resumes from the
others' checkpoints."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster import storage
from models.nets import gpt
from tests.support import workers
from train.config import loader
from train.config.sections import Config
from train.data.dataset import Dataset
from train.gan.config import GanConfig
from train.gpt.config import GptConfig
from train.parallel import zero
from train.parallel.state import Shard, State
from train.run import checkpoint

STEPS = 8
MIDDLE = f"checkpoints/step_{STEPS // 2:06d}"
SHAPE = {
    "batch.global_size": 24,
    "batch.micro_size": 12,
    "parallel.workers": 2,
    "data.vocab_size": 300,
    "model.dropout": 0.0,
    "optim.clip": 0.5,  # below the gradient norm, so that clipping is compared too
    "log.every": 1,
    "log.eval_every": STEPS,
    "checkpoint.every": STEPS // 2,
    "steps": STEPS,
}
ZERO = {
    f"zero{stage}": {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
    for stage in range(4)
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "accumulated": {"batch.micro_size": 3},
    **ZERO,
    "zero2 accumulated": {**ZERO["zero2"], "batch.micro_size": 3},
    "zero3 accumulated": {**ZERO["zero3"], "batch.micro_size": 3},
    "bf16": {"parallel.precision": "bf16"},
    "zero1 bf16": {**ZERO["zero1"], "parallel.precision": "bf16"},
    "zero3 bf16": {**ZERO["zero3"], "parallel.precision": "bf16"},
    "fp16": {"parallel.precision": "fp16"},
    **(
        {"compiled": {"compile": True}, "zero2 compiled": {**ZERO["zero2"], "compile": True}}
        if shutil.which("g++")
        else {}
    ),
}
# Largest difference from one process in fp32: of a loss, and of a parameter after STEPS steps of
# Adam at 5e-3.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 1e-2), "fp16": (2e-2, 1e-2)}
NORM_TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}  # of the gradient norm, relative


def config_of(corpus: str, **values: Any) -> GptConfig:
    config = loader.load("gpt", "gpt-tiny", {**SHAPE, "data.source": corpus, **values})
    assert isinstance(config, GptConfig)
    return config


@pytest.fixture(scope="module")
def dataset(ray_address: str, corpus: str) -> Dataset:
    return workers.prepare(config_of(corpus), str(Path(corpus).parent))


def train_all(rank: int, corpus: str, dataset: Dataset, root: str) -> None:
    """Train every variant to its end, and again from a copy of its middle checkpoint."""
    for name, values in VARIANTS.items():
        config = config_of(corpus, **values)
        workers.run(config, dataset, f"{root}/{name}")
        resume(rank, config, dataset, f"{root}/{name}", f"{root}/{name} resumed")


def resume(
    rank: int,
    config: Config,
    dataset: Dataset,
    source: str,
    target: str,
    folder: str = MIDDLE,
) -> None:
    """Resume from a copy of another run's checkpoint, by default the middle one."""
    if rank == 0:
        shutil.copytree(f"{source}/{folder}", f"{target}/{folder}")
    if dist.is_initialized():
        dist.barrier()
    workers.run(config, dataset, target)


@pytest.fixture(scope="module")
def root(corpus: str, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train every variant with two workers, and `one` in one process without accumulation."""
    root = str(tmp_path_factory.mktemp("runs"))
    workers.run(
        config_of(corpus, **{"parallel.workers": 1, "batch.micro_size": 24}), dataset, f"{root}/one"
    )
    workers.spawn(2, train_all, corpus, dataset, root)
    return root


def losses(root: str, run: str) -> list[float]:
    return recorded(root, run, "loss")


def recorded(root: str, run: str, metric: str) -> list[float]:
    rows = storage.read_json(f"{root}/{run}/rows.json")
    return [row[metric] for row in rows if metric in row]


def state(root: str, run: str) -> dict[str, Any]:
    manifest = checkpoint.newest(f"{root}/{run}")
    assert manifest is not None
    return checkpoint.read(f"{root}/{run}", manifest)


def largest_difference(one: Any, other: Any) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_strategy_trains_like_one_process(root: str, variant: str) -> None:
    expected = losses(root, "one")
    assert expected[-1] < expected[0] - 0.2, "without learning the comparison means nothing"
    precision = VARIANTS[variant].get("parallel.precision", "fp32")
    loss, parameter = TOLERANCES[precision]
    assert losses(root, variant) == pytest.approx(expected, abs=loss)
    # Adam and clipping hide a gradient that is wrong by a factor; its norm shows it.
    assert recorded(root, variant, "grad_norm") == pytest.approx(
        recorded(root, "one", "grad_norm"), rel=NORM_TOLERANCES[precision]
    )
    one, other = state(root, "one"), state(root, variant)
    assert largest_difference(one["model"], other["model"]) < parameter
    assert other["model_progress"]["updates"] == STEPS
    if variant in ("accumulated", *ZERO):
        assert largest_difference(one["model_optimizer"], other["model_optimizer"]) < 1e-4


# ---- resume


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_equals_uninterrupted_run_bit_for_bit(root: str, variant: str) -> None:
    assert losses(root, f"{variant} resumed") == losses(root, variant)[STEPS // 2 :]
    uninterrupted, resumed = state(root, variant), state(root, f"{variant} resumed")
    for part in ("model", "model_optimizer"):
        assert all(
            torch.equal(resumed[part][name], value) for name, value in uninterrupted[part].items()
        ), part
    assert resumed["model_progress"] == uninterrupted["model_progress"]


# Each resumes the run of the one before it for two steps, with another strategy and number of
# workers.
CHAIN = [("zero3", 3), ("zero1", 2), ("ddp", 1), ("zero2", 3)]
# Evaluates and samples with the averaged weights after every step; training must keep its own.
AVERAGED = {
    "optim.ema_decay": 0.8,
    "optim.schedule": "constant",
    "steps": 2 * len(CHAIN),
    "log.eval_every": 1,
    "log.sample_every": 1,
}


def one_link(rank: int, corpus: str, dataset: Dataset, uri: str, link: int) -> None:
    variant, world_size = CHAIN[link]
    more = {"parallel.workers": world_size, "batch.micro_size": 4, "steps": 2 * link + 2}
    workers.run(config_of(corpus, **VARIANTS[variant], **(AVERAGED | more)), dataset, uri)


def test_any_strategy_resumes_from_any_other_at_any_number_of_workers(
    corpus: str, dataset: Dataset, tmp_path: Path
) -> None:
    for link, (_, world_size) in enumerate(CHAIN):
        workers.spawn(world_size, one_link, corpus, dataset, f"{tmp_path}/chain", link)
    workers.run(
        config_of(corpus, **AVERAGED, **{"parallel.workers": 1}), dataset, f"{tmp_path}/one"
    )
    chained, expected = state(str(tmp_path), "chain"), state(str(tmp_path), "one")
    assert set(chained) == {"model", "model_ema", "model_optimizer", "model_progress"}
    assert chained["model_progress"] == expected["model_progress"] == {"updates": 2 * len(CHAIN)}
    for part in ("model", "model_ema", "model_optimizer"):
        assert largest_difference(chained[part], expected[part]) < 1e-4, part
    assert largest_difference(expected["model"], expected["model_ema"]) > 1e-3, (
        "the average equals the weights"
    )
    assert losses(str(tmp_path), "chain") == pytest.approx(
        losses(str(tmp_path), "one")[-2:], abs=1e-5
    )


def offloaded(rank: int, folder: str) -> None:
    """Save the states after six steps: without offload, with it, and with it and a resume after
    three."""
    cases = [(False, [6]), (True, [6]), (True, [3, 3])]
    states = [[steps_of_zero(stage, *case) for case in cases] for stage in (1, 2, 3)]
    torch.save(states, f"{folder}/states.pt")


def steps_of_zero(stage: int, offload: bool, parts: list[int]) -> dict[str, torch.Tensor]:
    strategy = zero.DeepSpeed(stage=stage, offload=offload)
    state: State | None = None
    step = 0
    for part in parts:
        torch.manual_seed(0)
        model = gpt.build(97, 16, 32, 2, 2)
        if state is not None:
            gpt.restore(model, state["model"])
        groups = gpt.parameter_groups(model, 0.1)
        learner = strategy.learner(
            "model",
            gpt.NextTokenLoss(model),
            torch.optim.AdamW(groups, 1e-2),
            0.5,
            state,
            model=model,
        )
        for _ in range(part):
            ids = torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(step))
            with learner.accumulating(0, 1):
                learner.backward(learner(ids[:, :-1], ids[:, 1:]))
            learner.step()
            step += 1
        state = {
            name: {key: whole(value) for key, value in values.items()}
            for name, values in learner.state().items()
        }
    assert state is not None
    return {**state["model"], **state["model_optimizer"]}


def whole(value: Any) -> Any:
    """Return the whole tensor of a shard; with one worker the shard has all of it."""
    return (
        value.values.clone().view(value.shape) if isinstance(value, Shard) else copy.deepcopy(value)
    )


def test_offloaded_optimizer_is_saved_and_restored(tmp_path: Path) -> None:
    """Without a GPU nothing moves, but the same code runs."""
    workers.spawn(1, offloaded, str(tmp_path))
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    for plain, offload, resumed in states:
        assert largest_difference(plain, offload) < 1e-4  # after six steps of Adam at 1e-2
        assert all(torch.equal(resumed[name], value) for name, value in offload.items())


THREE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": ZERO["zero1"],
    "zero2": ZERO["zero2"],
    "zero3": ZERO["zero3"],
}


def train_with_three(rank: int, corpus: str, dataset: Dataset, images: Dataset, root: str) -> None:
    for name, values in THREE.items():
        config = config_of(corpus, **values, **WIDE)
        workers.run(config, dataset, f"{root}/{name}")
        resume(rank, config, dataset, f"{root}/{name}", f"{root}/{name} resumed")
    for name, values in GANS.items():
        gan = gan_config(**{"parallel.workers": 3}, **values)
        workers.run(gan, images, f"{root}/{name}")
        resume(rank, gan, images, f"{root}/{name}", f"{root}/{name} resumed")
        second = gan_config(**{"parallel.workers": 3, "steps": 2}, **values)
        alone = f"{root}/{alone_of(name)}"
        resume(rank, second, images, alone, f"{root}/{name} second", "checkpoints/step_000001")


def gan_config(**values: Any) -> GanConfig:
    shape = {
        "batch.global_size": 24,
        "batch.micro_size": 8,
        "model.width": 32,
        "steps": STEPS,
        "log.every": 1,
        "log.eval_every": STEPS,
    }
    config = loader.load(
        "gan",
        "gan-tiny",
        {
            **shape,
            "quality.samples": 50,
            "checkpoint.every": 1,
            "checkpoint.keep_last": STEPS,
            **values,
        },
    )
    assert isinstance(config, GanConfig)
    return config


GANS: dict[str, dict[str, Any]] = {
    "gan": {},
    "gan batch": {"model.norm": "batch"},
    "gan zero1": ZERO["zero1"],
    "gan zero2 batch": {**ZERO["zero2"], "model.norm": "batch"},
}


def alone_of(variant: str) -> str:
    """Return the run of one process that a variant is compared with."""
    return "gan batch alone" if variant.endswith("batch") else "gan alone"


WIDE = {
    "parallel.workers": 3,
    "batch.micro_size": 8,
    "model.width": 256,
    "optim.lr": 1e-3,
}  # several gradient buckets


@pytest.fixture(scope="module")
def three(corpus: str, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("three"))
    images = workers.prepare(gan_config(), root)
    for name in ("gan", "gan batch"):
        workers.run(
            gan_config(**{"parallel.workers": 1, "batch.micro_size": 24}, **GANS[name]),
            images,
            f"{root}/{name} alone",
        )
    workers.spawn(3, train_with_three, corpus, dataset, images, root)
    return root


@pytest.mark.parametrize("variant", [*THREE, *GANS])
def test_three_workers_resume_bit_for_bit(three: str, variant: str) -> None:
    """With three workers the order in which gradients are summed changes the last bits."""
    uninterrupted, resumed = state(three, variant), state(three, f"{variant} resumed")
    assert uninterrupted.keys() == resumed.keys()
    for part, tensors in uninterrupted.items():
        assert all(
            torch.equal(resumed[part][name], value)
            if torch.is_tensor(value)
            else resumed[part][name] == value
            for name, value in tensors.items()
        ), part
    if variant in THREE:
        assert losses(three, f"{variant} resumed") == losses(three, variant)[STEPS // 2 :]


@pytest.mark.parametrize("variant", GANS)
def test_three_workers_train_the_gan_like_one(three: str, variant: str) -> None:
    alone = alone_of(variant)
    one, other = (
        checkpoint.read(f"{three}/{run}", checkpoint.complete(f"{three}/{run}")[-1])
        for run in (alone, variant)
    )
    assert other["gan_cadence"]["critic_updates"] == 2, "not the checkpoint of the first step"
    for net in ("generator", "critic"):
        # With beta1 = 0 this is the last update's gradient: Adam has changed nothing of it.
        gradients = [name for name in one[f"{net}_optimizer"] if name.startswith("exp_avg/")]
        assert gradients
        for name in gradients:
            gradient = one[f"{net}_optimizer"][name]
            difference = (other[f"{net}_optimizer"][name] - gradient).abs().max()
            assert float(difference) <= 1e-5 * float(gradient.abs().max()), name
    for metric in ("critic_loss", "gradient_penalty", "generator_loss"):
        expected = recorded(three, alone, metric)
        assert recorded(three, variant, metric)[0] == pytest.approx(expected[0], abs=1e-5)
        # From the state after one process's first step: in three workers' own first step Adam
        # turns the last bits of the smallest gradients into whole steps.
        (second,) = recorded(three, f"{variant} second", metric)
        assert second == pytest.approx(expected[1], rel=1e-4)
        assert expected[0] != pytest.approx(expected[1], rel=1e-2), (
            "without learning the comparison means nothing"
        )

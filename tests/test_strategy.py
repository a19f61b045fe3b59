"""Any strategy, any number of workers and any accumulation train the same model, and go on from each other's checkpoints."""

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
from train.config import loader as configs
from train.config.sections import Config
from train.gan.config import GanConfig
from train.gpt.config import GptConfig
from train.parallel import zero
from train.parallel.state import Shard
from train.run import checkpoint

STEPS = 8
MIDDLE = f"checkpoints/step_{STEPS // 2:06d}"
SHAPE = {
    "batch.global_size": 24,
    "batch.micro_size": 12,
    "parallel.workers": 2,
    "data.vocab_size": 300,
    "model.dropout": 0.0,
    "optim.clip": 0.5,  # below the gradients' norm: clipping is part of what is compared
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
# Largest difference of a loss, and of a parameter after STEPS steps of Adam at 5e-3, from one process in fp32.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 1e-2), "fp16": (2e-2, 1e-2)}
NORM_TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}  # of the gradient's norm, relative


def config_of(corpus: str, **values: Any) -> GptConfig:
    config = configs.load("gpt", "gpt-tiny", {**SHAPE, "data.source": corpus, **values})
    assert isinstance(config, GptConfig)
    return config


@pytest.fixture(scope="module")
def dataset(ray_address: str, corpus: str) -> str:
    return workers.prepare(config_of(corpus), str(Path(corpus).parent))


def train_all(rank: int, corpus: str, dataset: str, root: str) -> None:
    """Every variant straight to its end, and again from a copy of its middle."""
    for name, values in VARIANTS.items():
        config = config_of(corpus, **values)
        workers.run(config, dataset, f"{root}/{name}")
        resume(rank, config, dataset, f"{root}/{name}", f"{root}/{name} resumed")


def resume(rank: int, config: Config, dataset: str, source: str, target: str) -> None:
    """Goes on from the middle of another run, as a run of its own."""
    if rank == 0:
        shutil.copytree(f"{source}/{MIDDLE}", f"{target}/{MIDDLE}")
    if dist.is_initialized():
        dist.barrier()
    workers.run(config, dataset, target)


@pytest.fixture(scope="module")
def root(corpus: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Runs of every variant by two workers, and one by one process that accumulates nothing."""
    root = str(tmp_path_factory.mktemp("runs"))
    workers.run(
        config_of(corpus, **{"parallel.workers": 1, "batch.micro_size": 24}), dataset, f"{root}/one"
    )
    workers.spawn(2, train_all, corpus, dataset, root)
    return root


def losses(root: str, run: str) -> list[float]:
    return figures(root, run, "loss")


def figures(root: str, run: str, tag: str) -> list[float]:
    return [row[tag] for row in storage.read_json(f"{root}/{run}/rows.json") if tag in row]


def state(root: str, run: str) -> dict[str, Any]:
    manifest = checkpoint.newest(f"{root}/{run}")
    assert manifest is not None
    return checkpoint.read(f"{root}/{run}", manifest)


def largest_difference(one: Any, other: Any) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_strategy_follows_one_processs_curve(root: str, variant: str) -> None:
    expected = losses(root, "one")
    assert expected[-1] < expected[0] - 0.2, "nothing was learned, so nothing is compared"
    precision = VARIANTS[variant].get("parallel.precision", "fp32")
    loss, parameter = TOLERANCES[precision]
    assert losses(root, variant) == pytest.approx(expected, abs=loss)
    # Adam, and clipping, hide a gradient that is too large by a factor; its norm does not.
    assert figures(root, variant, "grad_norm") == pytest.approx(
        figures(root, "one", "grad_norm"), rel=NORM_TOLERANCES[precision]
    )
    one, other = state(root, "one"), state(root, variant)
    assert largest_difference(one["model"], other["model"]) < parameter
    assert other["model_progress"]["updates"] == STEPS
    if variant in ("accumulated", *ZERO):
        assert largest_difference(one["model_optimizer"], other["model_optimizer"]) < 1e-4


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(root: str, variant: str) -> None:
    assert losses(root, f"{variant} resumed") == losses(root, variant)[STEPS // 2 :]
    straight, resumed = state(root, variant), state(root, f"{variant} resumed")
    for part in ("model", "model_optimizer"):
        assert all(
            torch.equal(resumed[part][name], value) for name, value in straight[part].items()
        ), part
    assert resumed["model_progress"] == straight["model_progress"]


# Each goes on for two steps from where the one before it stopped, by another strategy and another number of workers.
CHAIN = [("zero3", 3), ("zero1", 2), ("ddp", 1), ("zero2", 3)]
# Judged and sampled, with the averaged weights, in the middle too: training goes on with its own.
AVERAGED = {
    "optim.ema_decay": 0.8,
    "optim.schedule": "constant",
    "steps": 2 * len(CHAIN),
    "log.eval_every": 1,
    "log.sample_every": 1,
}


def one_link(rank: int, corpus: str, dataset: str, uri: str, link: int) -> None:
    variant, world_size = CHAIN[link]
    more = {"parallel.workers": world_size, "batch.micro_size": 4, "steps": 2 * link + 2}
    workers.run(config_of(corpus, **VARIANTS[variant], **(AVERAGED | more)), dataset, uri)


def test_any_strategy_goes_on_from_any_other_at_any_number_of_workers(
    corpus: str, dataset: str, tmp_path: Path
) -> None:
    for link, (_, world_size) in enumerate(CHAIN):
        workers.spawn(world_size, one_link, corpus, dataset, f"{tmp_path}/chain", link)
    workers.run(
        config_of(corpus, **AVERAGED, **{"parallel.workers": 1}), dataset, f"{tmp_path}/one"
    )
    chained, straight = state(str(tmp_path), "chain"), state(str(tmp_path), "one")
    assert set(chained) == {"model", "model_ema", "model_optimizer", "model_progress"}
    assert chained["model_progress"] == straight["model_progress"] == {"updates": 2 * len(CHAIN)}
    for part in ("model", "model_ema", "model_optimizer"):
        assert largest_difference(chained[part], straight[part]) < 1e-4, part
    assert largest_difference(straight["model"], straight["model_ema"]) > 1e-3, (
        "the average averages nothing"
    )
    assert losses(str(tmp_path), "chain") == pytest.approx(
        losses(str(tmp_path), "one")[-2:], abs=1e-5
    )


def offloaded(rank: int, folder: str) -> None:
    """Six steps straight, and three and three, with the optimizer in the CPU's memory; what both end with."""
    ways = [(False, [6]), (True, [6]), (True, [3, 3])]
    torch.save(
        [[steps_of_zero(stage, *way) for way in ways] for stage in (1, 2, 3)], f"{folder}/found.pt"
    )


def steps_of_zero(stage: int, offload: bool, parts: list[int]) -> dict[str, torch.Tensor]:
    spread = zero.DeepSpeed(stage=stage, offload=offload)
    state, step = None, 0
    for part in parts:
        torch.manual_seed(0)
        model = gpt.build(97, 16, 32, 2, 2)
        if state is not None:
            gpt.restore(model, state["model"])
        groups = gpt.parameter_groups(model, 0.1)
        learner = spread.learner(
            "model",
            gpt.NextTokenLoss(model),
            torch.optim.AdamW(groups, 1e-2),
            0.5,
            state,
            core=model,
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
    return state["model"] | state["model_optimizer"]


def whole(value: Any) -> Any:
    """One worker's fragment is the whole."""
    return (
        value.values.clone().view(value.shape) if isinstance(value, Shard) else copy.deepcopy(value)
    )


def test_an_offloaded_optimizer_is_saved_and_restored_like_any_other(tmp_path: Path) -> None:
    """On a GPU the state lies in the CPU's memory; here both are the CPU's, and the way through the code is the same."""
    workers.spawn(1, offloaded, str(tmp_path))
    for here, there, resumed in torch.load(tmp_path / "found.pt", weights_only=True):
        assert largest_difference(here, there) < 1e-4  # of six steps of Adam at 1e-2
        assert all(torch.equal(resumed[name], value) for name, value in there.items())


THREE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": ZERO["zero1"],
    "zero2": ZERO["zero2"],
    "zero3": ZERO["zero3"],
}


def by_three(rank: int, corpus: str, dataset: str, pictures: str, root: str) -> None:
    for name, values in THREE.items():
        config = config_of(corpus, **values, **WIDE)
        workers.run(config, dataset, f"{root}/{name}")
        resume(rank, config, dataset, f"{root}/{name}", f"{root}/{name} resumed")
    for name, values in GANS.items():
        gan = gan_of(**{"parallel.workers": 3}, **values)
        workers.run(gan, pictures, f"{root}/{name}")
        resume(rank, gan, pictures, f"{root}/{name}", f"{root}/{name} resumed")


def gan_of(**values: Any) -> GanConfig:
    shape = {
        "batch.global_size": 24,
        "batch.micro_size": 8,
        "model.width": 32,
        "steps": STEPS,
        "log.every": 1,
        "log.eval_every": STEPS,
    }
    config = configs.load(
        "gan",
        "gan-tiny",
        {**shape, "quality.samples": 50, "checkpoint.every": STEPS // 2, **values},
    )
    assert isinstance(config, GanConfig)
    return config


GANS: dict[str, dict[str, Any]] = {
    "gan": {},
    "gan batch": {"model.norm": "batch"},
    "gan zero1": ZERO["zero1"],
    "gan zero2 batch": {**ZERO["zero2"], "model.norm": "batch"},
}
WIDE = {
    "parallel.workers": 3,
    "batch.micro_size": 8,
    "model.width": 256,
    "optim.lr": 1e-3,
}  # several buckets of gradients


@pytest.fixture(scope="module")
def three(corpus: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("three"))
    pictures = workers.prepare(gan_of(), root)
    workers.spawn(3, by_three, corpus, dataset, pictures, root)
    for name in ("gan", "gan batch"):
        workers.run(
            gan_of(**{"parallel.workers": 1, "batch.micro_size": 24}, **GANS[name]),
            pictures,
            f"{root}/{name} alone",
        )
    return root


@pytest.mark.parametrize("variant", [*THREE, *GANS])
def test_three_workers_resume_bit_for_bit(three: str, variant: str) -> None:
    """With three, the order in which gradients are summed shows in the last bits."""
    straight, resumed = state(three, variant), state(three, f"{variant} resumed")
    assert straight.keys() == resumed.keys()
    for part, values in straight.items():
        assert all(
            torch.equal(resumed[part][name], value)
            if torch.is_tensor(value)
            else resumed[part][name] == value
            for name, value in values.items()
        ), part
    if variant in THREE:
        assert losses(three, f"{variant} resumed") == losses(three, variant)[STEPS // 2 :]


@pytest.mark.parametrize("variant", GANS)
def test_three_workers_train_the_gan_that_one_does(three: str, variant: str) -> None:
    alone = "gan batch alone" if variant.endswith("batch") else "gan alone"
    for tag in ("critic_loss", "gradient_penalty", "generator_loss"):
        expected, found = figures(three, alone, tag), figures(three, variant, tag)
        # The second step's figures follow from both nets' first updates. Later ones tell little: Adam makes whole steps of a gradient's last bits.
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
        assert found[1] == pytest.approx(expected[1], rel=1e-4)
        assert expected[0] != pytest.approx(expected[1], rel=1e-2), (
            "nothing was learned, so nothing is compared"
        )

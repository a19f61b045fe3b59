"""One config, spelled one way; what is wrong is said in one sentence with its key."""

from pathlib import Path

import pytest
import yaml

from train.config import loader as configs
from train.gan.config import GanConfig
from train.gpt.config import GptConfig

PRESETS = sorted(configs.PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_shipped_preset_loads_and_survives_a_round_trip(preset: Path, tmp_path: Path) -> None:
    kind = yaml.safe_load(preset.read_text())["kind"]
    config = configs.load(kind, preset.stem)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert configs.load(kind, str(tmp_path / "again.yaml")) == config


def test_defaults_are_below_the_file_and_the_file_below_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.01, clip: 2.0}\nsteps: 7\n")
    config = configs.load(
        "gpt", str(file), configs.parse("gpt", ["--optim.lr", "3e-4", "--data.source", "a.txt"])
    )
    assert isinstance(config, GptConfig)
    assert (config.optim.lr, config.optim.clip, config.optim.weight_decay, config.steps) == (
        3e-4,
        2.0,
        0.01,
        7,
    )
    assert config.data.source == ["a.txt"]
    gan = configs.load(
        "gan", None, configs.parse("gan", ["--data.size", "64", "--data.channels", "3"])
    )
    assert isinstance(gan, GanConfig)
    assert (gan.data.size, gan.data.channels) == (64, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--optim.lrr", "1"], "there is no option --optim.lrr, did you mean optim.lr?"),
        (["--learning_rate", "1"], "there is no option --learning_rate"),
        (["--optim.lr"], "argument --optim.lr: expected one argument"),
        (["--parallel.static_graph", "true"], "option --parallel.static_graph is refused"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^" + sentence.replace("?", r"\?")):
        configs.parse("gpt", arguments)


@pytest.mark.parametrize(
    ("kind", "values", "parts"),
    [
        ("gpt", {"optim.lr": "fast"}, ["optim.lr", "'fast'", "valid number"]),
        ("gpt", {"optim.lr": -1}, ["optim.lr", "-1", "greater than 0"]),
        ("gpt", {"optim.lr": float("nan")}, ["optim.lr", "finite"]),
        ("gan", {"optim.critic_lr": -1}, ["optim.critic_lr is -1"]),
        ("gan", {"data.size": 33}, ["data.size", "33", "28, 32, 64 or 128"]),
        ("gpt", {"optim.lrr": 1}, ["optim.lrr", "did you mean optim.lr?"]),
        (
            "gpt",
            {"batch.global_size": 9, "parallel.workers": 2},
            ["batch.global_size is 9", "2 workers"],
        ),
        (
            "gpt",
            {"batch.global_size": 32, "batch.micro_size": 12},
            ["batch.micro_size is 12", "32"],
        ),
        ("gpt", {"model.width": 100, "model.heads": 3}, ["model.width is 100", "3 heads"]),
        ("gpt", {"run.name": "../elsewhere"}, ["run.name", "'../elsewhere'"]),
        ("gpt", {"parallel.zero_stage": 4}, ["parallel.zero_stage", "4", "0, 1, 2 or 3"]),
        (
            "gpt",
            {"parallel.offload": True, "parallel.gpu": True},
            ["parallel.offload", "--parallel.strategy deepspeed"],
        ),
        (
            "gpt",
            {"parallel.offload": True, "parallel.strategy": "deepspeed"},
            ["parallel.offload", "without parallel.gpu"],
        ),
        (
            "gpt",
            {"parallel.precision": "fp16", "parallel.strategy": "deepspeed"},
            ["parallel.precision fp16", "bf16"],
        ),
        (
            "gpt",
            {"compile": True, "parallel.strategy": "deepspeed", "parallel.zero_stage": 3},
            ["compile", "stage 3", "--compile false"],
        ),
        ("gan", {"compile": True}, ["compile", "penalty"]),
        (
            "gan",
            {"parallel.strategy": "deepspeed", "parallel.zero_stage": 3},
            ["parallel.zero_stage is 3", "penalty", "use 0, 1 or 2"],
        ),
        (
            "gan",
            {"model.critic_norm": "batch"},
            ["model.critic_norm batch", "penalty", "layer or none"],
        ),
        (
            "gan",
            {"model.norm": "batch", "batch.global_size": 32, "batch.micro_size": 8},
            ["4 micro-batches", "--batch.micro_size 32"],
        ),
        (
            "gan",
            {"parallel.static_graph": True},
            ["parallel.static_graph is refused", "without an error"],
        ),
    ],
)
def test_a_wrong_value_is_named(kind: str, values: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        configs.load(kind, None, values)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_preset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean gpt-tiny"):
        configs.load("gpt", "gpt-tniy")
    with pytest.raises(ValueError, match=r"another kind of run: use `python -m train gpt`"):
        configs.load("gan", "gpt-tiny")
    (tmp_path / "broken.yaml").write_text("optim: {lr: [")
    with pytest.raises(ValueError, match=r"broken.yaml is not valid YAML"):
        configs.load("gpt", str(tmp_path / "broken.yaml"))


def test_accumulation_follows_from_the_workers() -> None:
    def shape(workers: int, micro: int) -> tuple[int, int]:
        config = configs.load(
            "gpt",
            None,
            {"batch.global_size": 24, "batch.micro_size": micro, "parallel.workers": workers},
        )
        return config.micro_size, config.accumulation

    assert [shape(1, 6), shape(2, 6), shape(4, 6), shape(8, 6)] == [(6, 4), (6, 2), (6, 1), (3, 1)]


def test_the_command_line_says_what_is_wrong_and_exits_2(command) -> None:  # type: ignore[no-untyped-def]
    done = command("train", "gpt", "--config", "gpt-tiny", "--optim.lr", "-3")
    assert done.returncode == 2
    assert "optim.lr is '-3'" in done.stderr
    assert "Traceback" not in done.stderr
    dry = command("train", "gpt", "--config", "gpt-tiny", "--dry-run")
    assert dry.returncode == 0
    assert "20 steps of 8 samples on 1 CPU worker(s)" in dry.stdout

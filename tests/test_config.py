"""The config: presets, precedence, the command line's keys, and refusals that name the key."""

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster.cli import Parser
from train.config import loader as configs
from train.gan.config import GanConfig
from train.gpt.config import GptConfig
from train.kinds import KINDS

PRESETS = sorted(configs.PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_loads_and_equals_itself_after_a_round_trip(preset: Path, tmp_path: Path) -> None:
    kind = yaml.safe_load(preset.read_text())["kind"]
    config = configs.load(kind, preset.stem)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert configs.load(kind, str(tmp_path / "again.yaml")) == config


def test_command_line_overrides_file_and_file_overrides_defaults(tmp_path: Path) -> None:
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
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "there is no option --optim.lrr, did you mean optim.lr?"),
        (["--learning_rate", "1"], "there is no option --learning_rate"),
        (["--optim.lr"], "argument --optim.lr: expected one argument"),
        (["--parallel.static_graph", "true"], "option --parallel.static_graph is refused"),
    ],
)
def test_invalid_option_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r"^" + message.replace("?", r"\?")):
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
def test_invalid_value_is_refused(kind: str, values: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        configs.load(kind, None, values)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_preset_other_kind_and_invalid_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean gpt-tiny"):
        configs.load("gpt", "gpt-tniy")
    with pytest.raises(ValueError, match=r"another kind of run: use `python -m train gpt`"):
        configs.load("gan", "gpt-tiny")
    (tmp_path / "broken.yaml").write_text("optim: {lr: [")
    with pytest.raises(ValueError, match=r"broken.yaml is not valid YAML"):
        configs.load("gpt", str(tmp_path / "broken.yaml"))


def test_accumulation_follows_from_the_number_of_workers() -> None:
    def shape(workers: int, micro: int) -> tuple[int, int]:
        config = configs.load(
            "gpt",
            None,
            {"batch.global_size": 24, "batch.micro_size": micro, "parallel.workers": workers},
        )
        return config.micro_size, config.accumulation

    assert [shape(1, 6), shape(2, 6), shape(4, 6), shape(8, 6)] == [(6, 4), (6, 2), (6, 1), (3, 1)]


# ---- the command line


def options(kind: str = "gpt") -> tuple[Parser, configs.KeyOptions]:
    """Return a parser with an option of its own and the keys of a config."""
    parser = Parser(prog="program", allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    return parser, configs.KeyOptions(parser, kind)


def help_of(parser: argparse.ArgumentParser) -> str:
    """Return --help with white space collapsed."""
    return " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    "text",
    [
        "usage: program [options] [--KEY VALUE]...",
        "--dry-run print the plan",
        "run options: Identity and resumption of a run.",
        "--optim.lr float The highest learning rate. (default: 5e-05)",
        "--parallel.gpu bool One GPU per worker (NCCL); otherwise CPU (gloo). (default: false)",
        "--parallel.zero_stage {0,1,2,3} DeepSpeed:",
        "--data.source list[str] shakespeare (shipped);",
        '(default: ["shakespeare"])',
        '--sample.prompt str Text that the samples continue. (default: "\\n")',
        "(default: made from the preset's name and the time). --run.resume",  # null is not shown
    ],
)
def test_help_lists_keys_with_their_text_and_default(text: str) -> None:
    assert text in help_of(options()[0])


@pytest.mark.parametrize("kind", ["gpt", "gan"])
def test_help_has_a_text_for_every_key(kind: str) -> None:
    parser, _ = options(kind)
    model = KINDS[kind].config
    texts = {action.dest: action.help or "" for action in parser._actions}
    assert set(configs.keys(model)) <= set(texts)
    without = [key for key in configs.keys(model) if texts[key].startswith("(") or not texts[key]]
    assert without == []
    assert "None" not in parser.format_help()


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], {}),
        (["--dry-run"], {}),
        (["--steps", "3", "--optim.lr=1e-3"], {"steps": "3", "optim": {"lr": "1e-3"}}),
        (["--optim", '{"lr": 1}', "--optim.clip", "2"], {"optim": {"lr": 1, "clip": "2"}}),
        (["--data.source", "a,b"], {"data": {"source": ["a", "b"]}}),
        (["--data.source", "a", "--data.source", "b"], {"data": {"source": ["a", "b"]}}),
        (["--data.source", '["a,b"]'], {"data": {"source": ["a,b"]}}),
        (["--run.name", "null"], {"run": {"name": None}}),
    ],
)
def test_key_options_give_nested_values(arguments: list[str], values: dict[str, object]) -> None:
    parser, keys = options()
    keys.check(arguments)
    assert keys.values(parser.parse_args(arguments)) == values


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--optim.lrr", "there is no option --optim.lrr, did you mean optim.lr?"),
        ("--lr=3", "there is no option --lr, did you mean optim.lr?"),
        ("--dry-rnu", "there is no option --dry-rnu, did you mean dry-run?"),
        ("--nothing-like-it", "there is no option --nothing-like-it"),
        ("--parallel.static_graph", "option --parallel.static_graph is refused: DDP would"),
    ],
)
def test_key_options_refuse_unknown_names(argument: str, message: str) -> None:
    _, keys = options()
    with pytest.raises(ValueError, match=r".") as caught:
        keys.check(["--dry-run", "--steps", "3", argument])
    assert str(caught.value).startswith(message)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in message)


Command = Callable[..., subprocess.CompletedProcess[str]]


def test_command_line_names_the_invalid_value_and_exits_with_2(command: Command) -> None:
    done = command("train", "gpt", "--config", "gpt-tiny", "--optim.lr", "-3")
    assert done.returncode == 2
    assert "optim.lr is '-3'" in done.stderr
    assert "Traceback" not in done.stderr
    stray = command("train", "gpt", "gpt-tiny", "--dry-run")
    assert stray.returncode == 2
    assert "unknown argument gpt-tiny" in stray.stderr


def test_dry_run_prints_the_config_and_the_plan(command: Command) -> None:
    dry = command("train", "gpt", "--config", "gpt-tiny", "--dry-run")
    assert dry.returncode == 0
    assert "20 steps of 8 samples on 1 CPU worker(s)" in dry.stdout
    config, _, _ = dry.stdout.partition("plan: ")
    expected = configs.load("gpt", "gpt-tiny")
    assert config == expected.to_yaml()
    as_json = command("train", "gpt", "--config", "gpt-tiny", "--dry-run", "--json")
    assert yaml.safe_load(as_json.stdout) == {"kind": "gpt", **expected.model_dump()}

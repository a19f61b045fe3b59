"""The command line that all packages share: options, help, errors and exit codes."""

import argparse
import importlib
import json
import re

import pytest

from cluster import cli

# Every package whose commands are a `cli.Program`.
PACKAGES = ("cluster", "models", "serve", "train", "tune")


def program() -> cli.Program:
    """Return a program that prints the arguments of its commands as JSON."""

    def print_arguments(arguments: argparse.Namespace) -> int:
        values = {
            name: value
            for name, value in vars(arguments).items()
            if name in {"storage", "json", "steps", "keys"}
        }
        cli.print_json(values)
        return 3

    example = cli.Program("example", "An example.", epilog="A note.")
    command = example.command("count", print_arguments, "count steps", prints_json=True)
    command.add_argument("--steps", type=int, help="how many")
    example.command("fit", print_arguments, "fit a model", storage=None, takes_keys=True)
    return example


def fails(argv: list[str]) -> int:
    raise ValueError(f"the message, after {argv}")


# ---------------------------------------------------------------- a program


def test_command_gets_its_arguments_and_returns_the_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program().main(["count", "--steps", "5", "--storage", "s3://a/ü", "--json"]) == 3
    output = capsys.readouterr().out
    assert json.loads(output) == {"steps": 5, "storage": "s3://a/ü", "json": True, "keys": []}
    assert "s3://a/ü" in output, "JSON is printed as UTF-8, not escaped"


def test_storage_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KILN_STORAGE", raising=False)
    given = argparse.Namespace(storage=None)
    assert cli.storage_of(given) == "kiln"
    monkeypatch.setenv("KILN_STORAGE", "s3://bucket/kiln")
    assert cli.storage_of(given) == "s3://bucket/kiln"
    assert cli.storage_of(argparse.Namespace(storage="here")) == "here"


def test_command_that_takes_keys_gets_unknown_options_in_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ["--optim.lr", "1e-3", "--batch.size=4", "--on"]
    assert program().main(["fit", *keys]) == 3
    assert json.loads(capsys.readouterr().out) == {"keys": keys}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cuont"], "unknown command cuont, did you mean count?; see `python -m example --help`"),
        (["x"], "unknown command x: use count, fit; see `python -m example --help`"),
        (
            ["count", "--setps", "5"],
            "unknown argument --setps, did you mean --steps?; see `python -m example count --help`",
        ),
        (
            ["count", "--jsno=1"],
            "unknown argument --jsno, did you mean --json?; see `python -m example count --help`",
        ),
        (["count", "5"], "unknown argument 5; see `python -m example count --help`"),
        (
            ["--setps", "count"],
            "unknown argument --setps, did you mean --steps?; see `python -m example count --help`",
        ),
        (
            ["count", "--steps", "five"],
            "argument --steps: invalid int value: 'five'; see `python -m example count --help`",
        ),
        (["count", "--step", "5"], "unknown argument --step, did you mean --steps?"),
        (["--debg"], "the following arguments are required: COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments_are_named_with_the_nearest_valid_one(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(program().main, argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_without_arguments_a_program_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert program().main([]) == 2
    assert capsys.readouterr().out.startswith("usage: python -m example [-h] COMMAND ...")


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("optim.lrr", ["optim.lr", "batch.size"], ", did you mean optim.lr?"),
        ("lr", ["optim.lr", "batch.size"], ", did you mean optim.lr?"),
        ("gtp", ["gpt", "gan"], ", did you mean gpt?"),
        ("cats", ["gpt", "gan"], ""),
        ("gpt", [], ""),
    ],
)
def test_misspelt_word_names_the_nearest_known_one(word: str, known: list[str], hint: str) -> None:
    assert cli.nearest(word, known) == hint


# ---------------------------------------------------------------- running one


def test_debug_after_two_dashes_belongs_to_the_command_that_follows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(fails, ["submit", "--", "train", "--debug"]) == 2
    assert (
        capsys.readouterr().err
        == "error: the message, after ['submit', '--', 'train', '--debug']\n"
    )
    assert cli.run(fails, ["--debug", "submit", "--", "train", "--debug"]) == 2
    traceback = capsys.readouterr().err
    assert traceback.startswith("Traceback")
    assert "['submit', '--', 'train', '--debug']" in traceback


def test_each_outcome_has_its_exit_code_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        def main(argv: list[str]) -> int:
            raise error

        return cli.run(main, [])

    assert cli.run(lambda argv: None, []) == 0
    assert cli.run(lambda argv: 7, []) == 7
    assert raising(FileNotFoundError(2, "No such file or directory", "x.yaml")) == 2
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == (
        "error: [Errno 2] No such file or directory: 'x.yaml'\ninterrupted\n"
    )
    with pytest.raises(RuntimeError):  # a defect, not bad input: its traceback is shown
        raising(RuntimeError("broken"))


def test_port_is_a_number_from_1_to_65535() -> None:
    assert (cli.port("1"), cli.port("65535")) == (1, 65535)
    for text in ("0", "65536", "-1", "http", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 65535"):
            cli.port(text)


# ---------------------------------------------------------------- the packages' help


def help_of(capsys: pytest.CaptureFixture[str], package: str, *command: str) -> str:
    main = importlib.import_module(f"{package}.__main__").main
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("package", PACKAGES)
def test_help_of_every_command_has_the_same_shape(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    overview = help_of(capsys, package)
    assert overview.startswith(f"usage: python -m {package} [-h] COMMAND ...\n")
    listing = overview.split("\ncommands:\n")[1].split("\n\n")[0]
    commands = re.findall(r"^    ([a-z][a-z-]*)", listing, re.MULTILINE)
    assert commands
    for command in commands:
        text = help_of(capsys, package, command)
        assert text.startswith(f"usage: python -m {package} {command} [")
        own, common = text.split("\ncommon options:\n")
        assert "\noptions:\n  -h, --help " in own
        assert "  --debug " in common
        for option in ("--storage", "--json", "--debug"):
            assert f"\n  {option} " not in own, f"{option} of {command} is not a common option"

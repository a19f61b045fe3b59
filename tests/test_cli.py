"""What all commands share: how they end, and what their options take."""

import argparse

import pytest

from cluster import cli


def fails(argv: list[str]) -> int:
    raise ValueError(f"the sentence, after {argv}")


def test_debug_is_the_command_s_own_before_two_dashes_and_not_after(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(fails, ["submit", "--", "train", "--debug"]) == 2
    assert (
        capsys.readouterr().err
        == "error: the sentence, after ['submit', '--', 'train', '--debug']\n"
    )
    assert cli.run(fails, ["--debug", "submit", "--", "train", "--debug"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert "['submit', '--', 'train', '--debug']" in told


def test_a_port_is_a_number_that_can_be_asked_for() -> None:
    assert (cli.port("1"), cli.port("65535")) == (1, 65535)
    for text in ("0", "65536", "-1", "http", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 65535"):
            cli.port(text)

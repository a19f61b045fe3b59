"""What all five commands share: their parser, the options they have in common, and how they end.

A command is a `Program` with subcommands; each is a function of its parsed arguments that returns
an exit code. Bad input is a `ValueError` whose message becomes one line on stderr, exit code 2.
"""

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

DEFAULT_STORAGE = "kiln"
# For the --help of commands that take a model.
REFERENCE = (
    "REF is NAME (its alias production, else its newest version), NAME/VERSION or NAME@ALIAS."
)

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


class Program:
    """`python -m NAME COMMAND ...`.

    Args:
        name: the package's name.
        description: what the program does, for --help.
        epilog: a note below the list of commands.
    """

    def __init__(self, name: str, description: str, epilog: str | None = None) -> None:
        self.parser = Parser(
            prog=f"python -m {name}", description=description, epilog=epilog, allow_abbrev=False
        )
        self._commands = self.parser.add_subparsers(
            title="commands", metavar="COMMAND", required=True, parser_class=Parser
        )
        self._parsers: dict[str, Parser] = {}

    def command(
        self,
        name: str,
        function: Command,
        text: str,
        *,
        storage: str | None = "where data, runs and models lie",
        prints_json: bool = False,
        takes_keys: bool = False,
        epilog: str | None = None,
    ) -> Parser:
        """Add a subcommand and return its parser, for options of its own.

        Args:
            name: as it is typed.
            function: runs it; returns the exit code.
            text: what it does, one line.
            storage: what --storage means here; None: the command has no such option.
            prints_json: the command prints a result, which --json prints as JSON (`print_json`).
            takes_keys: arguments that the parser does not know are left to the command, in
                `arguments.rest`.
            epilog: a note below the options.
        """
        parser: Parser = self._commands.add_parser(
            name, help=text, description=text, epilog=epilog, allow_abbrev=False
        )
        parser.set_defaults(function=function, takes_keys=takes_keys)
        common = parser.add_argument_group("common options")
        if storage is not None:
            common.add_argument(
                "--storage",
                metavar="URI",
                help=f"{storage}: a folder or URI (default: KILN_STORAGE, else ./{DEFAULT_STORAGE})",
            )
        if prints_json:
            common.add_argument(
                "--json", action="store_true", help="print the result as JSON on stdout"
            )
        # `run` acts on it; it is here for --help.
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self._parsers[name] = parser
        return parser

    def main(self, argv: list[str]) -> int:
        """Parse `argv` and run its command; print the help where there is none.

        Raises:
            ValueError: an option or command is unknown; names the nearest.
        """
        if not argv:
            self.parser.print_help()
            return 2
        if not argv[0].startswith("-") and argv[0] not in self._parsers:
            hint = nearest(argv[0], list(self._parsers))
            raise ValueError(f"unknown command {argv[0]}{hint}; see `{self.parser.prog} --help`")
        arguments, unknown = self.parser.parse_known_args(argv)
        arguments.rest = unknown
        if unknown and not arguments.takes_keys:
            known = self._parsers[argv[0]]._option_string_actions
            name = unknown[0].split("=", 1)[0]
            hint = nearest(name, list(known)) if name.startswith("--") else ""
            raise ValueError(
                f"unknown argument {name}{hint}; see `{self._parsers[argv[0]].prog} --help`"
            )
        function: Command = arguments.function
        return function(arguments)


def storage_of(arguments: argparse.Namespace) -> str:
    """Return --storage, or the default where it was not given."""
    return str(arguments.storage or storage_default())


def storage_default() -> str:
    """Return where runs, data and models go without --storage: KILN_STORAGE, or ./kiln."""
    return os.environ.get("KILN_STORAGE") or DEFAULT_STORAGE


def print_json(value: Any) -> None:
    """Print a command's result as JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def port(text: str) -> int:
    """Return a TCP port; argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: it is not a number from 1 to 65535.
    """
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: use a number from 1 to 65535")
    return int(text)


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `, did you mean ...?` for a misspelt word, or "" where nothing is near.

    Dotted keys are near to each other by their last part too: `lr` is near `optim.lr`.
    """
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6) or [
        by_leaf[leaf]
        for leaf in difflib.get_close_matches(
            word.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.7
        )
    ]
    return f", did you mean {close[0]}?" if close else ""


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a command; a ValueError (bad input, by our convention) or an OSError becomes one line
    on stderr and exit code 2.

    `--debug` anywhere on the command line shows the traceback instead. After `--` it belongs to
    the command named there.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in (argv[: argv.index("--")] if "--" in argv else argv)
    if debug:
        argv.remove("--debug")
    try:
        return main(argv) or 0
    except (ValueError, OSError) as error:  # an OSError says what could not be opened, and why
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

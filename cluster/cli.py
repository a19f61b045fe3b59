"""The command line of all five packages: parser, common options, JSON output and exit codes.

A command is a `Program` with subcommands. A subcommand is a function that takes the parsed
arguments and returns an exit code. Bad input raises `ValueError`, whose message `run` prints as
one line on stderr; the exit code is then 2.

    program = Program("models", "List, inspect and verify the registry's models.")
    program.command("list", list_models, "list every version of every model", prints_json=True)
    sys.exit(cli.run(program.main))
"""

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

DEFAULT_STORAGE = "kiln"
# The epilog of commands that take a model.
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
        self._subparsers = self.parser.add_subparsers(
            title="commands", metavar="COMMAND", required=True, parser_class=Parser
        )
        self._parsers: dict[str, Parser] = {}

    def command(
        self,
        name: str,
        function: Command,
        text: str,
        *,
        storage: str | None = "where data, runs and models are stored",
        prints_json: bool = False,
        takes_keys: bool = False,
        epilog: str | None = None,
    ) -> Parser:
        """Add a subcommand and return its parser, to which its own options are added.

        Args:
            name: the word on the command line.
            function: runs the command and returns its exit code.
            text: what the command does, in one line.
            storage: what --storage means for this command. None: it has no such option.
            prints_json: add --json, with which the command calls `print_json` on its result.
            takes_keys: accept any further --KEY VALUE; `arguments.keys` holds them, unparsed.
            epilog: a note below the options.
        """
        parser: Parser = self._subparsers.add_parser(
            name, help=text, description=text, epilog=epilog, allow_abbrev=False
        )
        parser.set_defaults(function=function, parser=parser, takes_keys=takes_keys, keys=[])
        common = parser.add_argument_group("common options")
        if storage is not None:
            common.add_argument(
                "--storage",
                metavar="URI",
                help=f"{storage}: a folder or URI "
                f"(default: $KILN_STORAGE, else ./{DEFAULT_STORAGE})",
            )
        if prints_json:
            common.add_argument(
                "--json", action="store_true", help="print the result as JSON on stdout"
            )
        # `run` acts on --debug; it is added here so that --help lists it.
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self._parsers[name] = parser
        return parser

    def main(self, argv: list[str]) -> int:
        """Parse `argv`, run its command and return the exit code. Without arguments, print help.

        Raises:
            ValueError: as `parse` does, or bad input to the command.
        """
        if not argv:
            self.parser.print_help()
            return 2
        arguments = self.parse(argv)
        function: Command = arguments.function
        return function(arguments)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Return the parsed arguments of a command line that is not empty.

        Raises:
            ValueError: an unknown command or option (the message names the nearest known one), or
                an invalid value.
        """
        if not argv[0].startswith("-") and argv[0] not in self._parsers:
            hint = nearest(argv[0], list(self._parsers)) or f": use {', '.join(self._parsers)}"
            raise ValueError(f"unknown command {argv[0]}{hint}; see `{self.parser.prog} --help`")
        arguments, unknown = self.parser.parse_known_args(argv)
        if arguments.takes_keys:
            arguments.keys = unknown
        elif unknown:
            name = unknown[0].split("=", 1)[0]
            known = list(arguments.parser._option_string_actions)
            hint = nearest(name, known) if name.startswith("--") else ""
            raise ValueError(f"unknown argument {name}{hint}; see `{arguments.parser.prog} --help`")
        return arguments


def storage_of(arguments: argparse.Namespace) -> str:
    """Return the value of --storage, or `storage_default()` where it was not given."""
    return str(arguments.storage or storage_default())


def storage_default() -> str:
    """Return where data, runs and models are stored without --storage: KILN_STORAGE or ./kiln."""
    return os.environ.get("KILN_STORAGE") or DEFAULT_STORAGE


Log = Callable[[str], None]
"""Called with each progress message."""


def log(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def no_log(line: str) -> None:
    """Print nothing: with --json, the result is all that a command prints."""


def typed(path: str | os.PathLike[str]) -> str:
    """Return a path as a user would type it: below the working directory without that."""
    return os.fspath(path).removeprefix(f"{Path.cwd()}/")


def print_json(value: object) -> None:
    """Print a command's result as JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def port(text: str) -> int:
    """Parse a TCP port; for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: `text` is not a number from 1 to 65535.
    """
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: use a number from 1 to 65535")
    return int(text)


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `, did you mean X?` for a misspelt word, or "" where no known word is similar.

    Dotted keys are compared by their last part too: `lr` is similar to `optim.lr`.
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
    """Call `main` and return its exit code.

    A ValueError (by convention: bad input) or an OSError becomes one line on stderr and exit code
    2, Ctrl-C exit code 130. `--debug` anywhere on the command line prints the traceback instead
    of the line; after `--` it belongs to the command that follows there.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in (argv[: argv.index("--")] if "--" in argv else argv)
    if debug:
        argv.remove("--debug")
    try:
        return main(argv) or 0
    except (ValueError, OSError) as error:  # an OSError names the file and the reason
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

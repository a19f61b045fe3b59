"""How every command of ours ends: a result, or one sentence on stderr and exit code 2."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable

DEFAULT_STORAGE = "kiln"
REF = "REF is NAME (its alias production, else its newest version), NAME/VERSION or NAME@ALIAS."  # where --help tells of models


def storage_default() -> str:
    """Where runs, data and models go unless --storage says otherwise: KILN_STORAGE, or ./kiln."""
    return os.environ.get("KILN_STORAGE") or DEFAULT_STORAGE


def port(text: str) -> int:
    """A TCP port, as argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: it is none that one can ask for.
    """
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: use a number from 1 to 65535")
    return int(text)


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs a command; a `ValueError` (bad input, by our convention) or an `OSError` becomes one sentence and exit code 2.

    `--debug` anywhere on the command line shows the traceback instead; after `--` it belongs to the command named there.
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

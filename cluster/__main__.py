"""python -m cluster up | down | status | submit | doctor | demo."""

import argparse
import os
import sys
from pathlib import Path

from cluster import cli, dashboard, local, status, storage


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return int(arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        command.add_argument(
            "--storage",
            metavar="URI",
            help="where the cluster's jobs keep their files (KILN_STORAGE; default ./kiln)",
        )
        return command

    command = add("up", _up, "start a Ray head on this machine, in the background")
    command.add_argument(
        "--port",
        type=cli.port,
        help=f"of Ray's control service (default: {local.GCS_PORT}, or a free one)",
    )
    command.add_argument(
        "--dashboard-port",
        type=cli.port,
        help=f"on 127.0.0.1 (default: {local.DASHBOARD_PORT}, or a free one)",
    )
    command.add_argument("--num-cpus", type=int, help="logical CPUs (default: the machine's)")
    add("down", _down, "end this machine's head, its jobs and nothing else")
    add("status", _status, "show nodes, resources and jobs")
    command = add("submit", _submit, "run a command as a job, follow its log, exit as it ended")
    command.add_argument(
        "entrypoint", nargs="+", metavar="COMMAND", help="after --, as in: -- python -m train gpt"
    )
    add("doctor", _doctor, "check versions, disks, accelerators and storage on every node")
    command = add(
        "demo",
        _demo,
        "the whole road on this machine: train, export, serve and ask a GPT and a GAN",
    )
    command.add_argument(
        "--stay",
        action=argparse.BooleanOptionalAction,
        help="keep the page up until Ctrl-C (default: at a terminal)",
    )
    command.add_argument(
        "--preset",
        choices=["demo", "tiny"],
        default="demo",
        help="tiny: in seconds, and not worth looking at",
    )
    return parser


def _up(arguments: argparse.Namespace) -> int:
    head, started = local.up(
        _storage(arguments), arguments.port, arguments.dashboard_port, arguments.num_cpus
    )
    flag = "" if arguments.storage is None else f" --storage {arguments.storage}"
    print(
        f"{'Ray is up' if started else 'Ray runs already'} at {head.address}; jobs keep their files in {head.storage}"
    )
    print(
        f"  dashboard  {head.dashboard.url} (asks for the token in {_short(head.home / 'token')})"
    )
    print(f"  join it    source {_short(head.home / 'env')}")
    print("  submit     ray job submit --working-dir . -- python -m train gpt --config gpt-tiny")
    print(f"  stop       python -m cluster down{flag}")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    ended = local.down(_storage(arguments))
    print(
        f"Ray is down: {ended} processes ended"
        if ended
        else f"nothing to end: no cluster was up for storage {_storage(arguments)}"
    )
    return 0


def _status(arguments: argparse.Namespace) -> int:
    status.show(_dashboard(arguments))
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from cluster import jobs  # imports ray, which the other commands need not wait for

    return jobs.submit(_dashboard(arguments), arguments.entrypoint)


def _doctor(arguments: argparse.Namespace) -> int:
    examined = storage.absolute(
        _storage(arguments)
    )  # before the cluster's own KILN_STORAGE is here
    if not os.environ.get("RAY_ADDRESS"):
        _running_head(examined).join(os.environ)
    elif arguments.storage and (
        head := local.find(examined)
    ):  # else it is what the nodes of the joined cluster should see
        head.join(os.environ)
    from cluster import doctor  # imports ray, which reads the environment as it is imported

    return doctor.examine(examined)


def _demo(arguments: argparse.Namespace) -> int:
    from cluster.demo import demo

    return demo.run(_demo_folder(arguments.storage), arguments.stay, arguments.preset)


def _storage(arguments: argparse.Namespace) -> str:
    return str(arguments.storage or cli.storage_default())


def _demo_folder(given: str | None) -> Path:
    """Beside the user's runs, or in ./kiln where those are remote: the demo's pictures are to be looked at here.

    Raises:
        ValueError: `given` is remote.
    """
    if given is None:
        return (storage.local_path(cli.storage_default()) or Path(cli.DEFAULT_STORAGE)) / "demo"
    local_path = storage.local_path(given)
    if local_path is None:
        raise ValueError(
            f"--storage {given} is not on this machine, where the demo leaves its text and pictures: name a folder"
        )
    return local_path


def _dashboard(arguments: argparse.Namespace) -> dashboard.Dashboard:
    """That of the cluster which --storage names, else of the one this shell has joined, else of the one that runs here."""
    joined = None if arguments.storage else dashboard.from_environment()
    return joined or _running_head(_storage(arguments)).dashboard


def _running_head(storage_uri: str) -> local.Head:
    head = local.find(storage_uri)
    if head is None:
        raise ValueError(
            f"no cluster is up for storage {storage_uri}: start one with `python -m cluster up`, or source a cluster's env file"
        )
    return head


def _short(path: Path) -> str:
    """As a user would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(cli.run(main))

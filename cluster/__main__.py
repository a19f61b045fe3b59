"""The commands of `python -m cluster`."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from cluster import cli, dashboard, local, status, storage


def main(argv: list[str]) -> int:
    return program().main(argv)


def program() -> cli.Program:
    cluster = cli.Program(
        "cluster", "Start a Ray cluster on this machine, inspect it and submit jobs to it."
    )
    jobs_storage = "where the cluster's jobs store their files"

    command = cluster.command(
        "up", up, "start a Ray head on this machine, in the background", storage=jobs_storage
    )
    command.add_argument(
        "--port",
        type=cli.port,
        help=f"port of Ray's control service (default: {local.GCS_PORT}, or a free port)",
    )
    command.add_argument(
        "--dashboard-port",
        type=cli.port,
        help="port of the dashboard, on 127.0.0.1 "
        f"(default: {local.DASHBOARD_PORT}, or a free port)",
    )
    command.add_argument("--num-cpus", type=int, help="logical CPUs (default: the machine's)")

    cluster.command(
        "down", down, "end this machine's head and its jobs, nothing else", storage=jobs_storage
    )
    cluster.command(
        "status",
        show_status,
        "show nodes, resources and jobs",
        storage=jobs_storage,
        prints_json=True,
    )

    command = cluster.command(
        "submit",
        submit,
        "run a command as a job, print its log, exit with 0 if it succeeded",
        storage=jobs_storage,
    )
    command.add_argument(
        "entrypoint",
        nargs="+",
        metavar="COMMAND",
        help="command to run, after --, as in: -- python -m train gpt",
    )

    cluster.command(
        "doctor",
        check_nodes,
        "check package versions, free disk and access to the storage on every node",
        storage="the storage that every node should see",
        prints_json=True,
    )

    command = cluster.command(
        "demo",
        demo,
        "train, export and serve a GPT and a GAN on this machine",
        storage="where the demo stores everything (default: demo/ in the default storage)",
    )
    command.add_argument(
        "--stay",
        action=argparse.BooleanOptionalAction,
        help="keep serving until Ctrl-C (default: yes in a terminal, else no)",
    )
    command.add_argument(
        "--preset",
        choices=["demo", "tiny"],
        default="demo",
        help="tiny: finishes fast, its models are useless (default: demo)",
    )
    return cluster


def up(arguments: argparse.Namespace) -> int:
    head, started = local.up(
        cli.storage_of(arguments), arguments.port, arguments.dashboard_port, arguments.num_cpus
    )
    verb = "Ray is up" if started else "Ray runs already"
    token, env = cli.typed(head.folder / "token"), cli.typed(head.folder / "env")
    option = "" if arguments.storage is None else f" --storage {arguments.storage}"
    print(f"{verb} at {head.address}; jobs store their files in {head.storage}")
    print(f"  dashboard  {head.dashboard.url} (asks for the token in {token})")
    print(f"  join it    source {env}")
    print("  submit     ray job submit --working-dir . -- python -m train gpt --config gpt-tiny")
    print(f"  stop       python -m cluster down{option}")
    return 0


def down(arguments: argparse.Namespace) -> int:
    storage_uri = cli.storage_of(arguments)
    ended = local.down(storage_uri)
    if ended:
        print(f"Ray is down: {ended} processes ended")
    else:
        print(f"nothing to end: no cluster was up for storage {storage_uri}")
    return 0


def show_status(arguments: argparse.Namespace) -> int:
    found = status.read(_dashboard(arguments))
    if arguments.json:
        cli.print_json(found)
    else:
        status.show(found)
    return 0


def submit(arguments: argparse.Namespace) -> int:
    from cluster import jobs  # imports ray, which takes seconds

    return jobs.submit(_dashboard(arguments), arguments.entrypoint)


def check_nodes(arguments: argparse.Namespace) -> int:
    # Read before the cluster's own KILN_STORAGE is put into the environment.
    storage_uri = storage.absolute(cli.storage_of(arguments))
    if not os.environ.get("RAY_ADDRESS"):
        _running_head(storage_uri).join(os.environ)
    elif arguments.storage and (head := local.find(storage_uri)):
        head.join(os.environ)
    # else: --storage names what the nodes of the cluster at RAY_ADDRESS should see.
    from cluster import doctor  # imports ray, which reads the environment when it is imported

    reports = []
    for report in doctor.examine(storage_uri):
        reports.append(report)
        if not arguments.json:
            print(f"{report.address}: {report.cpus:g} CPUs, {report.gpus:g} GPUs", flush=True)
            for finding in report.findings:
                print(f"  WRONG: {finding}", flush=True)
    findings = sum(len(report.findings) for report in reports)
    if arguments.json:
        cli.print_json([asdict(report) for report in reports])
    else:
        print(f"{findings} findings" if findings else "every node is healthy")
    return 1 if findings else 0


def demo(arguments: argparse.Namespace) -> int:
    from cluster.demo import demo  # imports numpy and Pillow, which take a second

    return demo.run(demo_folder(arguments.storage), arguments.stay, arguments.preset)


def demo_folder(given: str | None) -> Path:
    """Return where the demo leaves its files: a folder on this machine, where they can be opened.

    Args:
        given: the value of --storage. None: demo/ in the default storage, or in ./kiln where the
            default storage is remote.

    Raises:
        ValueError: `given` is remote.
    """
    if given is None:
        return (storage.local_path(cli.storage_default()) or Path(cli.DEFAULT_STORAGE)) / "demo"
    local_path = storage.local_path(given)
    if local_path is None:
        raise ValueError(
            f"--storage {given} is not on this machine, where the demo leaves its text and images: "
            "name a folder"
        )
    return local_path


def _dashboard(arguments: argparse.Namespace) -> dashboard.Dashboard:
    """Return the dashboard of the cluster that a command means.

    It is the cluster of --storage, else the one that this shell has joined, else the one that runs
    for the default storage.
    """
    joined = None if arguments.storage else dashboard.from_environment()
    return joined or _running_head(cli.storage_of(arguments)).dashboard


def _running_head(storage_uri: str) -> local.Head:
    head = local.find(storage_uri)
    if head is None:
        raise ValueError(
            f"no cluster is up for storage {storage_uri}: start one with `python -m cluster up`, "
            "or source a cluster's env file"
        )
    return head


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""`python -m cluster`: one head per storage, jobs, status, and ending only its own processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from cluster import doctor, jobs, local, machine, storage
from cluster.dashboard import Dashboard
from tests.support.paths import ROOT


def shell(script: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a script in bash in the repository's root, without the variables of other clusters."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KILN_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=env | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def own_cluster(storage: Path) -> Iterator[Path]:
    answer = shell(f"python -m cluster up --storage {storage} --num-cpus 4")
    assert answer.returncode == 0, answer.stderr
    yield storage
    assert shell(f"python -m cluster down --storage {storage}").returncode == 0


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The storage of a cluster that runs during this module's tests."""
    yield from own_cluster(tmp_path_factory.mktemp("kiln"))


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Path]:
    """The storage of a cluster for one test, which may break it."""
    yield from own_cluster(tmp_path / "kiln")


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that belongs to no cluster."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def state_files(storage: Path) -> set[str]:
    """Return the files of a cluster's state, without the lock of `up` and `down`."""
    return {file.name for file in (storage / "cluster").iterdir()} - {"lock"}


def head_of(storage: Path) -> local.Head:
    head = local.find(str(storage))
    assert head is not None
    return head


# ---------------------------------------------------------------- up


def test_second_up_finds_the_running_head(up: Path) -> None:
    before = head_of(up)
    answer = shell(f"python -m cluster up --storage {up}")
    assert "runs already" in answer.stdout
    assert head_of(up) == before


def test_env_file_joins_a_shell_and_token_is_private(up: Path) -> None:
    answer = shell(f"unset KILN_STORAGE; source {up}/cluster/env; env; which ray")
    variables = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    assert variables["KILN_STORAGE"] == str(up)
    assert variables["RAY_AUTH_MODE"] == "token"
    assert Path(variables["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o077 == 0
    assert answer.stdout.splitlines()[-1] == str(Path(sys.executable).parent / "ray")


def test_dashboard_listens_on_localhost_and_requires_the_token(up: Path) -> None:
    dashboard = head_of(up).dashboard
    assert [node["state"] for node in dashboard.nodes()] == ["ALIVE"]
    assert httpx.get(f"{dashboard.url}/api/jobs/", timeout=30).status_code == 401
    with pytest.raises(ValueError, match="refuses the token"):
        replace(dashboard, token="wrong").jobs()
    bound = {
        item.laddr.ip
        for item in psutil.net_connections("tcp")
        if item.status == "LISTEN" and f":{item.laddr.port}" in dashboard.url
    }
    assert bound == {"127.0.0.1"}


def test_taken_port_is_an_error_if_requested_and_avoided_if_not(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = shell(f"python -m cluster up --storage {tmp_path} --port {port}")
        assert answer.returncode == 2
        assert answer.stderr.strip() == (
            f"error: --port {port} is taken by another process: choose another port, or omit "
            "--port to use a free one"
        )
        assert machine.free_port(port) != port
        assert machine.choose_port("--port", None, port) != port
    assert machine.free_port(port) == port
    assert machine.choose_port("--port", port, 1) == port


def test_failed_start_reports_the_log_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        local,
        "_start_command",
        lambda *_: [sys.executable, "-c", "raise SystemExit('no such luck')"],
    )
    with pytest.raises(ValueError, match=r"ended while it started.*no such luck"):
        local.up(str(tmp_path))
    assert state_files(tmp_path) == {"head.log"}


def test_interrupted_start_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, begun = local._launch, []

    def interrupted(planned: local.Head, num_cpus: int | None) -> local.Head:
        begun.append(launch(planned, num_cpus))
        # The state as it is before the process id is known.
        storage.write_json(planned.folder / "state.json", planned.__dict__)
        raise KeyboardInterrupt

    monkeypatch.setattr(
        local, "_start_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"]
    )
    monkeypatch.setattr(local, "_launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        local.up(str(tmp_path))
    assert not begun[0].is_running()
    assert not Path(begun[0].temp_dir).exists()
    assert state_files(tmp_path) == {"head.log"}


def test_port_that_is_taken_during_the_start_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports: list[int] = []

    def fail_once(planned: local.Head, num_cpus: int | None) -> local.Head:
        ports.append(planned.port)
        if len(ports) == 1:
            other.bind(("", planned.port))
            other.listen()
            raise ValueError("the Ray head ended while it started")
        return planned

    monkeypatch.setattr(local, "_launch", fail_once)
    monkeypatch.setattr(local, "_wait_until_ready", lambda head: None)
    monkeypatch.setattr(local, "_env_file", lambda head: "")
    with socket.socket() as other:
        head, started = local.up(str(tmp_path))
    assert started
    assert ports == [ports[0], head.port]
    assert head.port != ports[0]


def test_requested_port_that_is_taken_during_the_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(planned: local.Head, num_cpus: int | None) -> local.Head:
        raise ValueError("the Ray head ended while it started")

    monkeypatch.setattr(local, "_launch", fail)
    with pytest.raises(ValueError, match="ended while it started"):
        local.up(str(tmp_path), port=machine.free_port(), dashboard_port=machine.free_port())
    assert state_files(tmp_path) <= {"head.log"}


def test_two_concurrent_ups_start_one_head(tmp_path: Path) -> None:
    up = f"python -m cluster up --storage {tmp_path} --num-cpus 1"
    both = shell(f"{up} & {up}; wait")
    try:
        assert both.stdout.count("Ray is up at") == both.stdout.count("Ray runs already at") == 1, (
            both.stderr
        )
    finally:
        ended = shell(f"python -m cluster down --storage {tmp_path}").stdout
    assert "Ray is down" in ended
    assert not [
        process
        for process in psutil.process_iter()
        if str(tmp_path) in " ".join(environment(process).values())
    ]


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


def test_invalid_port_is_an_error_of_one_line(tmp_path: Path) -> None:
    answer = shell(f"python -m cluster up --storage {tmp_path} --port 70000")
    assert answer.returncode == 2
    assert answer.stderr == (
        "error: argument --port: '70000' is not a port: use a number from 1 to 65535; "
        "see `python -m cluster up --help`\n"
    )


def test_private_cluster_ignores_token_settings_of_an_earlier_one() -> None:
    twice = (
        "import ray; from cluster.connect import connect; "
        "print([(connect(num_cpus=1), ray.shutdown()) for _ in range(2)])"
    )
    gone = "RAY_AUTH_MODE=disabled RAY_AUTH_TOKEN_PATH=/nowhere/token"
    answer = shell(f'{gone} python -c "{twice}"')
    assert answer.stdout == "[(True, None), (True, None)]\n", answer.stderr[-3000:]


# ---------------------------------------------------------------- jobs


def test_submitted_training_writes_to_the_storage_of_the_cluster(
    up: Path,
) -> None:
    submission = "ray job submit --working-dir . -- python -m train gpt --config gpt-tiny"
    answer = shell(
        f"source {up}/cluster/env && {submission} --run.name submitted --parallel.workers 2"
    )
    assert answer.returncode == 0, answer.stdout[-3000:]
    assert "succeeded" in answer.stdout
    summary = json.loads((up / "runs" / "submitted" / "summary.json").read_text())
    assert summary["steps"] == 20
    assert head_of(up).dashboard.jobs()[-1]["status"] == "SUCCEEDED"


def test_job_runs_the_same_python_in_a_copy_and_submit_exits_with_its_result(up: Path) -> None:
    script = (
        "import os, sys; print([sys.executable, os.path.exists('cluster.yaml'), "
        "os.path.exists('.venv'), *sys.argv[1:]]); sys.exit(3)"
    )
    answer = shell(f'python -m cluster submit --storage {up} -- python -c "{script}" --debug')
    assert answer.returncode == 1
    assert str([sys.executable, True, False, "--debug"]) in answer.stdout
    assert answer.stdout.splitlines()[-1].endswith(": FAILED")


def test_submit_fails_for_a_stopped_job(up: Path) -> None:
    join = f"source {up}/cluster/env"
    job = 'import time; print("here", flush=True); time.sleep(300)'
    follow = f"{join}; python -m cluster submit -- python -c '{job}'"
    stop = """
        while read -r line; do
            echo "$line"
            case "$line" in
                job*) id=$(echo "$line" | cut -d' ' -f2);;
                here) ray job stop $id > /dev/null;;
            esac
        done
    """
    answer = shell(f"set -o pipefail; {join}; ( {follow} ) | ( {stop} )")
    assert answer.returncode == 1
    assert answer.stdout.splitlines()[-1].endswith(": STOPPED")


def test_submit_waits_for_the_job_after_its_log_is_cut_off(
    up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(self: JobSubmissionClient, job: str) -> AsyncIterator[str]:
        yield "begun\n"
        raise RuntimeError("WebSocket connection closed")

    # The address of another cluster, which this process has joined.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setattr(JobSubmissionClient, "tail_job_logs", broken)
    assert jobs.submit(head_of(up).dashboard, ["sleep", "1"], str(tmp_path)) == 0
    assert "was cut off (WebSocket connection closed)" in capsys.readouterr().out


def test_storage_option_overrides_the_joined_cluster(up: Path, tmp_path: Path) -> None:
    answer = shell(f"source {up}/cluster/env; python -m cluster status --storage {tmp_path}")
    assert answer.returncode == 2
    assert f"no cluster is up for storage {tmp_path}" in answer.stderr
    examined = shell(f"export KILN_STORAGE=/nowhere; python -m cluster doctor --storage {up}")
    assert "4 CPUs" in examined.stdout, examined.stderr


def test_status_and_doctor_describe_the_cluster(up: Path) -> None:
    status = shell(f"python -m cluster status --storage {up}")
    assert status.returncode == 0, status.stderr
    assert "ALIVE" in status.stdout
    examined = shell(f"RAY_AUTH_TOKEN=another python -m cluster doctor --storage {up}")
    assert "4 CPUs" in examined.stdout, examined.stderr
    assert "is not visible" not in examined.stdout
    assert not list((up / "cluster").glob("probe-*"))


def test_status_and_doctor_print_json(up: Path) -> None:
    answer = shell(f"python -m cluster status --json --storage {up}")
    assert answer.returncode == 0, answer.stderr
    status = json.loads(answer.stdout)
    assert [(node["state"], node["is_head_node"]) for node in status["nodes"]] == [("ALIVE", True)]
    assert status["resources"]["CPU"]["total"] == 4
    answer = shell(f"python -m cluster doctor --json --storage {up}")
    (report,) = json.loads(answer.stdout)
    assert (report["cpus"], report["gpus"]) == (4, 0)
    assert answer.returncode == (1 if report["findings"] else 0)


def test_without_a_cluster_commands_say_how_to_start_one(tmp_path: Path) -> None:
    for command, rest in (("status", ""), ("doctor", ""), ("submit", "-- true")):
        answer = shell(f"python -m cluster {command} --storage {tmp_path} {rest}")
        assert answer.returncode == 2
        assert "start one with `python -m cluster up`" in answer.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"versions": {"torch": "0.1"}}, "torch 0.1 here, 2.14 where this command runs"),
        ({"free_bytes": 2**30}, "1.0 GiB of disk left"),
        ({"sees_storage": False}, "set KILN_STORAGE to a folder or URI that all nodes share"),
    ],
)
def test_doctor_names_what_is_wrong(change: dict[str, Any], message: str | None) -> None:
    healthy = doctor.Probe(versions={"torch": "2.14"}, free_bytes=2**40, sees_storage=True)
    wrong = doctor.findings(replace(healthy, **change), {"torch": "2.14"}, "kiln/cluster/probe")
    assert len(wrong) == (message is not None)
    assert message is None or message in wrong[0]


def test_unreachable_dashboard_is_an_error_of_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ValueError, match=f"no Ray dashboard answers at http://127.0.0.1:{port}"):
        Dashboard(f"http://127.0.0.1:{port}", None).jobs()


# ---------------------------------------------------------------- down


def test_down_ends_a_job_with_its_children_and_no_other_process(
    fresh: Path, ray_address: str, bystander: subprocess.Popen[bytes]
) -> None:
    import ray

    child = "import time; time.sleep(600)"
    parent = (  # it starts the child in a new session, as a job may do with a server
        "import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', '{child}'], start_new_session=True); "
        f"print('begun', child.pid); {child}"
    )
    submission = "ray job submit --no-wait --submission-id long"
    submitted = shell(f'source {fresh}/cluster/env; {submission} -- python -c "{parent}"')
    assert submitted.returncode == 0, submitted.stdout
    head = head_of(fresh)
    deadline = time.monotonic() + 60
    while (
        "begun" not in (logs := shell(f"source {fresh}/cluster/env; ray job logs long").stdout)
        and time.monotonic() < deadline
    ):
        time.sleep(0.5)
    grandchild = psutil.Process(int(logs.split("begun ")[1].split()[0]))
    children = psutil.Process(head.pid).children(recursive=True)
    ours = machine.processes_with(local.ID_VARIABLE, head.id)
    assert grandchild in ours
    # Ray starts short-lived helpers all the time: ignore those that have ended in between.
    assert {process for process in children if machine.is_running(process)} <= {*ours}

    answer = shell(f"python -m cluster down --storage {fresh}")
    assert "Ray is down" in answer.stdout, answer.stderr
    assert not any(machine.is_running(process) for process in ours)
    assert not Path(head.temp_dir).exists()
    assert state_files(fresh) == {"head.log"}
    # Another Ray cluster and another process on this machine still run.
    assert ray.get(ray.remote(lambda: "alive").remote()) == "alive"
    assert bystander.poll() is None
    assert "nothing to end" in shell(f"python -m cluster down --storage {fresh}").stdout


def test_up_waits_for_the_agent_that_starts_jobs(
    up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = local.find(str(up))
    assert head is not None
    monkeypatch.setattr(local, "START_TIMEOUT_S", 1)
    local._wait_until_ready(head)
    (tmp_path / "ray").mkdir()
    shutil.copy(head._address_file, tmp_path / "ray")
    with pytest.raises(ValueError, match="the Ray head did not answer within 1 s"):
        local._wait_until_ready(replace(head, temp_dir=str(tmp_path)))


def test_up_after_a_crash_removes_what_is_left_and_starts_a_new_head(fresh: Path) -> None:
    crashed = head_of(fresh)
    left = machine.processes_with(local.ID_VARIABLE, crashed.id)
    os.kill(crashed.pid, signal.SIGKILL)
    answer = shell(f"python -m cluster up --storage {fresh} --num-cpus 1")
    assert "Ray is up" in answer.stdout, answer.stderr
    assert head_of(fresh).id != crashed.id
    assert not any(machine.is_running(process) for process in left)


def record(storage: Path, **fields: Any) -> local.Head:
    head = local.Head(
        "0" * 32, socket.gethostname(), 1, 0.0, 6379, 8265, "/tmp/kiln-gone", str(storage)
    )
    head = replace(head, **fields)
    (storage / "cluster").mkdir()
    (storage / "cluster" / "state.json").write_text(json.dumps(head.__dict__))
    return head


@pytest.mark.parametrize(
    "reused", [True, False], ids=["reused process id", "same id and start, other cluster id"]
)
def test_down_does_not_end_a_process_by_its_process_id(
    tmp_path: Path, bystander: subprocess.Popen[bytes], reused: bool
) -> None:
    started = psutil.Process(bystander.pid).create_time()
    head = record(tmp_path, pid=bystander.pid, started=started - 3600 if reused else started)
    assert head.is_running() is not reused
    assert local.down(str(tmp_path)) == 0
    assert bystander.poll() is None


def test_down_refuses_a_head_on_another_machine(tmp_path: Path) -> None:
    record(tmp_path, host="elsewhere")
    with pytest.raises(ValueError, match=r"'elsewhere'.*--storage of its own.*delete the file"):
        local.down(str(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [{"temp_dir": "/tmp/kiln-x/../../home"}, {"temp_dir": "/home"}, {"id": None}, {"id": ""}],
)
def test_down_refuses_a_state_file_that_up_never_wrote(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    record(tmp_path, **fields)
    with pytest.raises(
        ValueError, match=rf"state\.json: {next(iter(fields))} is .*delete the file"
    ):
        local.down(str(tmp_path))


def test_down_keeps_the_state_file_while_a_process_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = record(tmp_path)
    survivor = subprocess.Popen(
        ["sleep", "600"], env={local.ID_VARIABLE: head.id, "PATH": os.defpath}
    )
    monkeypatch.setattr(machine, "end_processes", lambda *_: 0)
    with pytest.raises(ValueError, match=rf"processes \[{survivor.pid}\] .* do not end"):
        local.down(str(tmp_path))
    assert "state.json" in state_files(tmp_path)
    monkeypatch.undo()
    assert local.down(str(tmp_path)) == 1
    assert state_files(tmp_path) == set()
    survivor.wait()


@pytest.mark.parametrize("content", ["{", '{"pid": 1}'])
def test_damaged_state_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json"):
        local.find(str(tmp_path))


# ---------------------------------------------------------------- cluster.yaml


def validated(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.fixture(params=["cluster.yaml", "cluster/gcp.yaml"])
def cloud(request: pytest.FixtureRequest) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / request.param).read_text())
    return config


def test_cloud_cluster_has_the_documented_nodes_and_no_cpus_on_its_head(
    cloud: dict[str, Any],
) -> None:
    types = validated(cloud)["available_node_types"]
    assert set(types) == {"head", "gpu_spot", "gpu_on_demand", "cpu"}
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu_spot"]["resources"]["GPU"] > 0
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"].get("priority", 0)


def test_cloud_nodes_require_the_token_and_the_dashboard_is_local(
    cloud: dict[str, Any],
) -> None:
    prepared = validated(cloud)
    head, worker = (
        prepared["head_start_ray_commands"][-1],
        prepared["worker_start_ray_commands"][-1],
    )
    assert "--dashboard-host=127.0.0.1" in head
    assert all(command.startswith(". ~/kiln.env; ulimit") for command in (head, worker))
    settings = next(command for command in prepared["setup_commands"] if "kiln.env" in command)
    assert "RAY_AUTH_MODE=token" in settings
    assert "~/.ray/auth_token" in prepared["file_mounts"]
    assert "KILN_STORAGE=" in settings


def test_cloud_cluster_installs_locked_versions_only(cloud: dict[str, Any]) -> None:
    prepared = validated(cloud)
    assert prepared["file_mounts"]["~/requirements.lock"] == "requirements.lock"
    locked = {
        line.split("==")[0]
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line
    }
    installs = [
        command.split("pip install --quiet ")[1]
        for command in every_setup(prepared)
        if "pip install" in command
    ]
    assert installs
    for install in installs:
        source, lock, *packages = install.split()
        assert (source, lock) in {("-r", "~/requirements.lock"), ("-c", "~/requirements.lock")}
        assert all("==" in package or package in locked for package in packages)


def every_setup(prepared: dict[str, Any]) -> list[str]:
    parts = (
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
    )
    return [command for part in parts for command in prepared[part]]


@pytest.mark.parametrize(
    "typo",
    [("max_worker",), ("available_node_types", "gpu_spot", "min_worker"), ("idle_timeout_minute",)],
)
def test_ray_rejects_a_misspelt_key(typo: tuple[str, ...]) -> None:
    import jsonschema

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    section = config
    for key in typo[:-1]:
        section = section[key]
    section[typo[-1]] = 1
    with pytest.raises(jsonschema.ValidationError):
        validated(config)

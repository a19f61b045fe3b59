"""One Ray cluster for the whole test session, in process and for the commands that tests start."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.marks import (  # noqa: F401  # hooks
    pytest_collection_modifyitems,
    pytest_ignore_collect,
)

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a private Ray cluster (4 logical CPUs, dashboard off) that ends with the session."""
    from cluster.connect import connect

    # Ray's sockets live below its temp dir, and a socket's path is limited to 107 bytes: keep it short.
    temp_dir = tempfile.mkdtemp(prefix="kiln-", dir="/tmp")
    os.environ.pop("RAY_ADDRESS", None)
    connect(num_cpus=4, _temp_dir=temp_dir, object_store_memory=512 * 1024 * 1024)
    import ray

    address = ray.get_runtime_context().gcs_address
    os.environ["RAY_ADDRESS"] = address
    yield address
    os.environ.pop("RAY_ADDRESS", None)
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small text file, in a folder of its own."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(
        "".join(f"{number}: Shall I compare thee to a summer's day?\n" for number in range(200))
    )
    return str(path)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of an empty bucket: a real S3 protocol, served on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="kiln")
        yield "s3://kiln"
    server.stop()


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m ARGS...` from the repository's root as a user would and returns what came out."""

    def run(*args: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *args],
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run

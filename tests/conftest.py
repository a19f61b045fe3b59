"""Fixtures for all tests: a Ray cluster, an S3 bucket, a text file, a shell."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest

from tests.support.paths import ROOT

pytest_plugins = ["tests.support.groups", "tests.support.marks"]


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray cluster that this process and the commands that it starts have joined.

    It has 4 logical CPUs and no dashboard, and ends with the session.
    """
    from cluster.connect import connect

    # Ray's sockets are in its temp dir, and a socket's path is limited to 107 bytes.
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
def registry_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with two GPT versions and a GAN (`tests.support.served.publish`)."""
    from tests.support import served

    return served.publish(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a small text file in a folder of its own."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(
        "".join(f"{number}: Shall I compare thee to a summer's day?\n" for number in range(200))
    )
    return str(path)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of an empty bucket on an S3 server on this machine."""
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
    """A function that runs `python -m ARGS...` in the repository's root, as a user would."""

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

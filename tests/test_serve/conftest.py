"""The application, served by the test session's Ray cluster while this folder's tests run."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from cluster.machine import free_port
from serve import launch, selection
from serve.deployments import Options


@pytest.fixture(scope="package")
def address() -> launch.Address:
    return launch.Address("127.0.0.1", free_port())


@pytest.fixture(scope="package")
def client(
    ray_address: str, registry_root: str, address: launch.Address, command: Callable[..., Any]
) -> Iterator[httpx.Client]:
    """An HTTP client of the served registry."""
    launch.deploy(selection.select(registry_root), address, Options(max_replicas=1))
    with httpx.Client(base_url=f"http://127.0.0.1:{address.port}", timeout=60) as client:
        yield client
        down = command("serve", "down")
        assert (down.returncode, down.stdout) == (0, "removed from the cluster\n"), down.stderr
        with pytest.raises(httpx.ConnectError):
            client.get("/health")

"""The deployments, their replicas and their load, for /status."""

import asyncio
import contextlib
import time
from typing import Any

import ray.exceptions
from ray import serve

# `serve.status()` does not include the target number of replicas.
from ray.serve.context import _get_global_client

from serve.errors import Unavailable
from serve.http.schemas import DeploymentStatus
from serve.remote import UNREACHABLE, Handle

LOAD_TIMEOUT_S = 2.0
MAX_AGE_S = 1.0  # every open page polls /status
LOAD = ("slots", "running", "waiting")


class ServeCluster:
    """The application's deployments (`serve.http.protocols.Cluster`).

    Args:
        handles: by deployment, of those whose replicas report their load.
    """

    def __init__(self, handles: dict[str, Handle]) -> None:
        self.handles = handles
        self.lock = asyncio.Lock()
        self.latest: dict[str, DeploymentStatus] = {}
        self.read_at = -MAX_AGE_S

    async def deployments(self) -> dict[str, DeploymentStatus]:
        """Return the status of each deployment, at most `MAX_AGE_S` old.

        Raises:
            Unavailable: Ray Serve's controller does not answer.
        """
        async with self.lock:
            if time.monotonic() - self.read_at >= MAX_AGE_S:
                self.latest = await self._read()
                self.read_at = time.monotonic()
        return self.latest

    async def _read(self) -> dict[str, DeploymentStatus]:
        client, application = _get_global_client(), serve.get_replica_context().app_name
        assert client is not None
        try:
            details = await asyncio.to_thread(client.get_serve_details)
        except ray.exceptions.RayError as error:
            raise Unavailable(
                "Ray Serve's controller does not answer at the moment: try again in a moment"
            ) from error
        deployments = details["applications"][application]["deployments"]
        loads = await asyncio.gather(*(self._load(name) for name in deployments))
        return {
            name: _deployment_status(found, load)
            for (name, found), load in zip(deployments.items(), loads, strict=True)
        }

    async def _load(self, name: str) -> dict[str, int | None]:
        """Return the load of a deployment: the sum over the replicas that respond.

        All values are None if none responds in time.
        """
        loads: list[Any] = []
        if name in self.handles:
            with contextlib.suppress(*UNREACHABLE):
                broadcast = self.handles[name].broadcast("load")
                loads = await broadcast.results_async(
                    timeout_s=LOAD_TIMEOUT_S, return_exceptions=True
                )
        known = [load for load in loads if isinstance(load, dict)]
        return {key: sum(load[key] for load in known) if known else None for key in LOAD}


def _deployment_status(details: dict[str, Any], load: dict[str, int | None]) -> DeploymentStatus:
    states = [replica["state"] for replica in details["replicas"]]
    return DeploymentStatus.model_validate(
        {
            "replicas": states.count("RUNNING"),
            "starting": states.count("STARTING"),
            "target": details["target_num_replicas"],
            "status": details["status"],
            **load,
        }
    )

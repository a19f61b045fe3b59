"""The HTTP API of a Ray dashboard: nodes, resources and jobs, read without joining the cluster."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import httpx

TIMEOUT_S = 30


class Node(TypedDict):
    """A node of the cluster."""

    node_ip: str
    is_head_node: bool
    state: str
    resources_total: dict[str, float]  # memory in bytes


class Job(TypedDict):
    """A job, or a driver that joined the cluster without the jobs API."""

    submission_id: str | None  # None: a driver
    job_id: str | None
    status: str
    entrypoint: str
    start_time: int | None  # ms since the epoch


@dataclass(frozen=True)
class Dashboard:
    """A dashboard and the token that it requires.

    Every method raises ValueError where the dashboard does not answer or refuses the token.
    """

    url: str
    token: str | None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def nodes(self) -> list[Node]:
        """Return every node that the cluster has had, lost ones included."""
        return [
            Node(
                node_ip=node["node_ip"],
                is_head_node=node["is_head_node"],
                state=node["state"],
                resources_total=node["resources_total"],
            )
            for node in self._get("/api/v0/nodes")["data"]["result"]["result"]
        ]

    def jobs(self) -> list[Job]:
        """Return every job, drivers that joined without the jobs API included."""
        return [
            Job(
                submission_id=job["submission_id"],
                job_id=job["job_id"],
                status=job["status"],
                entrypoint=job["entrypoint"],
                start_time=job["start_time"],
            )
            for job in self._get("/api/jobs/")
        ]

    def usage(self) -> dict[str, tuple[float, float]]:
        """Return {resource: (used, total)} of the whole cluster; memory in bytes."""
        report = self._get("/api/cluster_status")["data"]["clusterStatus"] or {}
        return {
            name: (used, total)
            for name, (used, total) in report.get("loadMetricsReport", {}).get("usage", {}).items()
        }

    def _get(self, path: str) -> Any:
        try:
            # trust_env=False: a proxy from the environment must not be used for this machine.
            response = httpx.get(
                self.url + path, headers=self.headers, timeout=TIMEOUT_S, trust_env=False
            )
        except httpx.HTTPError as error:
            raise ValueError(
                f"no Ray dashboard answers at {self.url} ({error}): start a cluster with "
                "`python -m cluster up`"
            ) from error
        if response.status_code in (401, 403):
            raise ValueError(
                f"the cluster at {self.url} refuses the token: source the env file that "
                "`python -m cluster up` wrote for it"
            )
        if response.is_error:
            raise ValueError(
                f"{self.url}{path} responds with status {response.status_code}: check that a Ray "
                "dashboard listens there"
            )
        return response.json()


def from_environment() -> Dashboard | None:
    """Return the dashboard of the cluster that this shell has joined, or None.

    The variables are Ray's own: RAY_API_SERVER_ADDRESS, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH.

    Raises:
        ValueError: the token file cannot be read.
    """
    url = os.environ.get("RAY_API_SERVER_ADDRESS")
    if not url:
        return None
    token, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not token and path:
        try:
            token = Path(path).read_text().strip()
        except OSError as error:
            raise ValueError(
                f"RAY_AUTH_TOKEN_PATH={path} cannot be read ({error.strerror}): source the env "
                "file of a running cluster"
            ) from error
    return Dashboard(url.rstrip("/"), token)

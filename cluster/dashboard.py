"""The HTTP API of a cluster's dashboard: nodes, resources and jobs, read without joining the cluster."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_S = 30


@dataclass(frozen=True)
class Dashboard:
    url: str
    token: str | None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def nodes(self) -> list[dict[str, Any]]:
        """Every node the cluster has seen: node_ip, is_head_node, state, resources_total, ..."""
        return list(self._get("/api/v0/nodes")["data"]["result"]["result"])

    def jobs(self) -> list[dict[str, Any]]:
        """Every job: submission_id (None for a driver that joined by itself), job_id, status, entrypoint, ..."""
        return list(self._get("/api/jobs/"))

    def usage(self) -> dict[str, tuple[float, float]]:
        """{resource: (used, total)} over the whole cluster; bytes for memory."""
        report = self._get("/api/cluster_status")["data"]["clusterStatus"] or {}
        return {
            name: (used, total)
            for name, (used, total) in report.get("loadMetricsReport", {}).get("usage", {}).items()
        }

    def _get(self, path: str) -> Any:
        try:
            # The proxy that a company's environment names is not the way to one's own machine.
            response = httpx.get(
                self.url + path, headers=self.headers, timeout=TIMEOUT_S, trust_env=False
            )
        except httpx.HTTPError as error:
            raise ValueError(
                f"no Ray dashboard answers at {self.url} ({error}): start a cluster with `python -m cluster up`"
            ) from error
        if response.status_code in (401, 403):
            raise ValueError(
                f"the cluster at {self.url} refuses the token: source the env file that `python -m cluster up` wrote for it"
            )
        if response.is_error:
            raise ValueError(
                f"{self.url}{path} answers {response.status_code}: is a Ray dashboard what listens there?"
            )
        return response.json()


def from_environment() -> Dashboard | None:
    """The cluster that this shell was joined to (RAY_API_SERVER_ADDRESS and Ray's own token variables)."""
    url = os.environ.get("RAY_API_SERVER_ADDRESS")
    if not url:
        return None
    token, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not token and path:
        try:
            token = Path(path).read_text().strip()
        except OSError as error:
            raise ValueError(
                f"RAY_AUTH_TOKEN_PATH={path} cannot be read ({error.strerror}): source the env file of a running cluster"
            ) from error
    return Dashboard(url.rstrip("/"), token)

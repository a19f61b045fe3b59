"""Submitting a command to a cluster and following its log to the end.

    python -m cluster submit -- python -m train gpt --config gpt-tiny

`ray job submit` exits with 0 for a job that was stopped; this command exits with 1.
"""

import asyncio
import os
import shlex
import time

from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.dashboard import Dashboard

POLL_S = 0.5


def submit(dashboard: Dashboard, command: list[str], working_dir: str = ".") -> int:
    """Run `command` as a job in a copy of `working_dir`, printing its log as it is written.

    Ctrl-C ends the following of the log, not the job.

    Returns:
        0 if the job succeeded, else 1.

    Raises:
        ValueError: no command was given, or the cluster refused the job (for example because
            `working_dir` is too large).
    """
    if not command:
        raise ValueError(
            "no command to submit: write it after --, as in "
            "`python -m cluster submit -- python -m train gpt`"
        )
    dashboard.jobs()  # raises a ValueError of one line if the cluster does not answer
    # Ray prefers this variable, where it is set, to the argument of the client.
    os.environ["RAY_API_SERVER_ADDRESS"] = dashboard.url
    client = JobSubmissionClient(dashboard.url, headers=dashboard.headers)
    try:
        job = client.submit_job(
            entrypoint=shlex.join(command), runtime_env={"working_dir": working_dir}
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the cluster refused the job: {error}") from error
    print(f"job {job} (to stop it: ray job stop {job})", flush=True)
    try:
        asyncio.run(_follow(client, job))
        status = _wait(client, job)
    except KeyboardInterrupt:
        print(f"\nstopped following the log; job {job} keeps running")
        raise
    print(f"job {job}: {status.value}")
    return 0 if status == JobStatus.SUCCEEDED else 1


async def _follow(client: JobSubmissionClient, job: str) -> None:
    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
    except RuntimeError as error:  # the connection was lost; the job may still run
        print(f"the log of job {job} was cut off ({error}): waiting for the job to end", flush=True)


def _wait(client: JobSubmissionClient, job: str) -> JobStatus:
    """Wait until the job has ended, which may be a moment after its log, and return its status."""
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(POLL_S)
    return status

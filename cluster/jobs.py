"""Submitting a command to a cluster and following it to its end.

    python -m cluster submit -- python -m train gpt --config gpt-tiny

`ray job submit` exits 0 for a job that was stopped; this asks the job's own status.
"""

import asyncio
import os
import shlex
import time

from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.dashboard import Dashboard

POLL_S = 0.5


def submit(dashboard: Dashboard, command: list[str], working_dir: str = ".") -> int:
    """Runs `command` as a job in a copy of `working_dir`, prints its log as it comes; 0 if the job succeeded, else 1.

    Ctrl-C stops the following, not the job.

    Raises:
        ValueError: no command, or the cluster refused the job (working_dir too large, for one).
    """
    if not command:
        raise ValueError(
            "nothing to submit: give the command after --, as in `python -m cluster submit -- python -m train gpt`"
        )
    dashboard.jobs()  # one sentence now if the cluster does not answer
    os.environ["RAY_API_SERVER_ADDRESS"] = (
        dashboard.url
    )  # Ray prefers what it finds there to the argument
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
        status = _end(client, job)
    except KeyboardInterrupt:
        print(f"\nno longer following; job {job} goes on")
        raise
    print(f"job {job}: {status.value}")
    return 0 if status == JobStatus.SUCCEEDED else 1


async def _follow(client: JobSubmissionClient, job: str) -> None:
    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
    except RuntimeError as error:  # the connection broke; the job did not
        print(f"the log of job {job} broke off ({error}): waiting for the job's end", flush=True)


def _end(client: JobSubmissionClient, job: str) -> JobStatus:
    # The log may end a moment before the status says why.
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(POLL_S)
    return status

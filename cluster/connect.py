"""The one door to Ray for `train`, `tune` and `serve`: the cluster that RAY_ADDRESS names, or a private one.

A command never attaches to a cluster that happens to run on the machine: it takes the one it was given
(`python -m cluster up` prints the variables, a submitted job has them), or starts its own, which ends with it.
"""

import logging
import os
import secrets
import socket
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled, without annotations


def connect(num_cpus: int | None = None, **private_options: Any) -> bool:
    """Connects this process to Ray; True when a private cluster was started for it.

    KILN_RAY_LOGS=1 shows the output of Ray's processes on this terminal.

    Args:
        num_cpus: logical CPUs of a private cluster; by default the machine's.
        private_options: further options of `ray.init` for a private cluster.

    Raises:
        ValueError: RAY_ADDRESS names a cluster that does not answer.
    """
    if ray.is_initialized():
        return False
    # Train workers run where the driver runs: a run's relative paths must mean the same there.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's own chatter hides what a command says; what our workers have to say reaches the driver in other ways.
    log_to_driver = os.environ.get("KILN_RAY_LOGS") == "1"
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _refuse_unreachable(address)
        _read_token_again()
        try:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=log_to_driver)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            raise ValueError(
                f"the Ray cluster at RAY_ADDRESS={address!r} refuses this process ({str(error).splitlines()[0]}): {_WAY_OUT}"
            ) from error
        return False
    # A token of its own: what Ray decides by itself depends on what an earlier command left in ~/.ray, and this shell may
    # still name the token of a cluster that is gone.
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    _read_token_again()
    private_options.setdefault("include_dashboard", False)
    ray.init(
        address="local",
        num_cpus=num_cpus,
        logging_level=logging.WARNING,
        log_to_driver=log_to_driver,
        **private_options,
    )
    return True


_WAY_OUT = "start one with `python -m cluster up` and source its env file, or unset RAY_ADDRESS"


def _read_token_again() -> None:
    """Importing ray read the environment, perhaps before its token was set there; a connection before this one did."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _refuse_unreachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ValueError(
            f"RAY_ADDRESS is {address!r}: a driver needs host:port (the URL of the jobs API goes into RAY_API_SERVER_ADDRESS)"
        )
    if not port.isdecimal():
        return  # "auto": Ray looks for itself
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS={address!r} ({error.strerror or error}): {_WAY_OUT}"
        ) from None

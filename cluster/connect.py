"""Connecting to Ray: the only place where `train`, `tune` and `serve` call `ray.init`.

A command joins the cluster that RAY_ADDRESS names, or starts a private one that ends with it. It
never attaches to a cluster that merely happens to run on the machine.
"""

import logging
import os
import secrets
import socket
from typing import Any

import ray
from ray._raylet import (  # type: ignore[attr-defined]  # compiled, without annotations
    AuthenticationTokenLoader,
    Config,
)

from cluster import machine

HINT = "start one with `python -m cluster up` and source its env file, or unset RAY_ADDRESS"


def connect(num_cpus: int | None = None, **private_options: Any) -> bool:
    """Connect this process to Ray and return whether a private cluster was started for it.

    KILN_RAY_LOGS=1 prints the output of Ray's processes to this terminal.

    Args:
        num_cpus: logical CPUs of a private cluster; default: the machine's.
        private_options: further options of `ray.init` for a private cluster.

    Raises:
        ValueError: the cluster at RAY_ADDRESS does not answer, or refuses this process.
    """
    if ray.is_initialized():
        return False
    # Train workers run in the driver's directory, so that a run's relative paths stay valid.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Off by default: Ray's logs would hide the command's own output. Workers report to the driver.
    log_to_driver = os.environ.get("KILN_RAY_LOGS") == "1"
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
        _reload_token()
        try:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=log_to_driver)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the Ray cluster at RAY_ADDRESS={address!r} refuses this process ({reason}): "
                f"{HINT}"
            ) from error
        return False
    # Set explicitly: Ray's default depends on what an earlier command left in ~/.ray, and this
    # shell may still name the token of a cluster that has ended.
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    _reload_token()
    private_options.setdefault("include_dashboard", False)
    with machine.starting_ray():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            logging_level=logging.WARNING,
            log_to_driver=log_to_driver,
            **private_options,
        )
    return True


def _reload_token() -> None:
    """Make Ray read its token variables again.

    Ray reads them when it is imported and when it connects; either may have happened before the
    current values were set.
    """
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _check_reachable(address: str) -> None:
    """Fail within seconds where `ray.init` would retry for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ValueError(
            f"RAY_ADDRESS is {address!r}: a driver needs host:port (the URL of the jobs API goes "
            "into RAY_API_SERVER_ADDRESS)"
        )
    if not port.isdecimal():
        return  # "auto": Ray finds the address itself
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS={address!r} ({reason}): {HINT}"
        ) from None

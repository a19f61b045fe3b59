"""The Ray Serve application: `Text` and `Pictures` (one model a replica), and the `Gateway` in front of both.

`build` is what a Serve config file names as its import path.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from serve.gateway import Gateway
from serve.replicas import QUEUE_LIMIT, Pictures, Text

HEALTH_CHECK_S = 1.0  # a replica whose engine has died refuses at once and so draws requests, until three checks have failed


class Options(BaseModel):
    """What an application consists of. The bundles are not named here, but in the deployments' `user_config`."""

    model_config = ConfigDict(extra="forbid")

    text: bool = True
    images: bool = True
    slots: int = 8  # texts that a replica writes at once
    threads: int = (
        1  # of ONNX Runtime, and CPUs that a replica reserves; more than one slows tiny models down
    )
    providers: list[str] | None = (
        None  # of models.runtime.PROVIDERS, best first; None: the best that a replica's machine has
    )
    max_replicas: int = 4  # of each model
    timeout_s: float = 300.0  # of a text, its waiting included
    blocklist: list[
        Annotated[str, Field(pattern=r"\S")]
    ] = []  # phrases that no prompt and no text may have (`serve.blocklist`)
    chunks_per_s: float = Field(
        default=100.0, gt=0
    )  # see `serve.engine.Engine`: each costs proxy, gateway and replica 1 to 2 ms of CPU


def build(options: Options) -> serve.Application:
    """What a Serve config names: `import_path: serve.deployments:build`, `args: {...Options...}`."""
    text = images = None
    if options.text:
        text = _model(Text, options, target_ongoing_requests=options.slots).bind(
            options.slots,
            options.threads,
            options.timeout_s,
            options.providers,
            options.chunks_per_s,
            options.blocklist,
        )
    if options.images:
        images = _model(Pictures, options, target_ongoing_requests=4).bind(
            options.threads, options.providers
        )
    gateway = serve.deployment(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return gateway(Gateway).bind(text, images)


def _model(replica: type, options: Options, target_ongoing_requests: float) -> serve.Deployment:
    return serve.deployment(
        # Serve's own preset: up after 30 s of load, down after 10 minutes without. Its delays are no shorter than its look-back,
        # so that the count does not swing.
        num_replicas="auto",
        autoscaling_config={
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": target_ongoing_requests,
        },
        ray_actor_options={"num_cpus": options.threads},
        # Twice what a replica holds: replicas queue and refuse by themselves. Were Serve's limit the lower one, its routers would
        # queue, without bound or fairness; and their default back-off of up to half a second halves the throughput at saturation.
        max_ongoing_requests=2 * (options.slots + QUEUE_LIMIT),
        request_router_config={
            "initial_backoff_s": 0.005,
            "backoff_multiplier": 1.5,
            "max_backoff_s": 0.02,
        },
        health_check_period_s=HEALTH_CHECK_S,
        max_constructor_retry_count=3,  # a bundle that cannot be loaded will not become loadable
        graceful_shutdown_wait_loop_s=0.5,
    )(replica)

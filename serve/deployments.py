"""The Ray Serve application: `TextReplica`, `ImageReplica`, and the `Gateway` in front of both.

A Serve config file names it as `import_path: serve.deployments:build`, with the fields of `Options`
as `args`.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from serve.gateway import Gateway
from serve.replicas import QUEUE_LIMIT, ImageReplica, TextReplica

# A replica whose engine has died refuses quickly, and so attracts requests until three health
# checks have failed.
HEALTH_CHECK_S = 1.0


class Options(BaseModel):
    """The options of the application, except the bundles: they are in `user_config`.

    Attributes:
        text, image: whether the modality is served.
        slots: texts that a replica generates at once.
        threads: of ONNX Runtime, and CPUs that a replica reserves. More than one slows tiny models
            down.
        providers: names from `models.runtime.PROVIDERS`, best first; None: the best that a
            replica's machine has.
        max_replicas: of each model.
        timeout_s: the longest time that a request for text may take, queueing included.
        blocklist: phrases that no prompt and no text may contain (`serve.text.blocklist`).
        chunks_per_s: see `serve.text.engine.Engine`. Each chunk costs proxy, gateway and replica
            1 to 2 ms of CPU time together.
    """

    model_config = ConfigDict(extra="forbid")

    text: bool = True
    image: bool = True
    slots: int = 8
    threads: int = 1
    providers: list[str] | None = None
    max_replicas: int = 4
    timeout_s: float = 300.0
    blocklist: list[Annotated[str, Field(pattern=r"\S")]] = []
    chunks_per_s: float = Field(default=100.0, gt=0)


def build(options: Options) -> serve.Application:
    """Build the application; the import path of a Serve config."""
    text = images = None
    if options.text:
        text = _deployment(TextReplica, options, target_ongoing_requests=options.slots).bind(
            options.slots,
            options.threads,
            options.timeout_s,
            options.providers,
            options.chunks_per_s,
            options.blocklist,
        )
    if options.image:
        images = _deployment(ImageReplica, options, target_ongoing_requests=4).bind(
            options.threads, options.providers
        )
    gateway = serve.deployment(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return gateway(Gateway).bind(text, images)


def _deployment(
    replica: type[TextReplica | ImageReplica], options: Options, target_ongoing_requests: float
) -> serve.Deployment:
    return serve.deployment(
        # Ray Serve's own preset: scale up after 30 s of load, down after 10 minutes without. Its
        # delays are at least as long as its look-back, so that the number does not oscillate.
        num_replicas="auto",
        autoscaling_config={
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": target_ongoing_requests,
        },
        ray_actor_options={"num_cpus": options.threads},
        # Twice what a replica holds, because replicas queue and refuse by themselves. With a lower
        # limit, Ray Serve's routers would queue, without bound or fairness.
        max_ongoing_requests=2 * (options.slots + QUEUE_LIMIT),
        # The default back-off of up to 0.5 s halves the throughput at saturation.
        request_router_config={
            "initial_backoff_s": 0.005,
            "backoff_multiplier": 1.5,
            "max_backoff_s": 0.02,
        },
        health_check_period_s=HEALTH_CHECK_S,
        max_constructor_retry_count=3,  # retries do not help if a bundle cannot be loaded
        graceful_shutdown_wait_loop_s=0.5,
    )(replica)

"""Find or train the feature extractor that evaluates images of a data set.

    dataset = prepare(config, dataset)                           # on the driver
    net = extractor_file.load(dataset.extractor["uri"], device)  # on each worker

It is trained once per data set, and lies beside it.
"""

import ray
import torch

from cluster import cli
from cluster.connect import connect
from train.data import images
from train.data.dataset import Dataset
from train.data.shipped.files import shipped
from train.gan import extractor_file, extractor_training
from train.gan.config import GanConfig

MIN_IMAGES = 10


def prepare(config: GanConfig, dataset: Dataset, log: cli.Log = cli.log) -> Dataset:
    """Return the data set with its extractor; train one where there is none yet.

    The shipped data come with an extractor. For others, training takes minutes.

    Args:
        config: the run's; its GPU, or as many CPUs as its workers have, train.
        dataset: a prepared data set; the extractor lies in its folder.
        log: called with each progress message.

    Raises:
        ValueError: the extractor is damaged, or the data set is too small for an evaluation.
    """
    _check_size(dataset)
    uri = extractor_file.find(dataset.uri, config.data.size)
    if uri is None and images.meta_of(dataset)["source"] == ["fashion-mnist"]:
        content = shipped("fashion-mnist-extractor.safetensors").read_bytes()
        uri = extractor_file.publish(content, dataset.uri, config.data.size)
    if uri is None:
        count = images.meta_of(dataset)["splits"]["train"]["images"]
        log(f"extractor: training on {count:,} images, once for this data set")
        uri = _train_on_cluster(config, dataset)
    _, card = extractor_file.read(uri)
    fingerprint = uri.removesuffix(".safetensors")[-12:]
    log(f"extractor {fingerprint}: {card}: {uri}")
    return dataset.with_extractor(extractor_file.lineage_entry(uri))


def _check_size(dataset: Dataset) -> None:
    for split, facts in images.meta_of(dataset)["splits"].items():
        if facts["images"] < MIN_IMAGES:
            raise ValueError(
                f"{dataset.uri} has {facts['images']} images in its {split} split, and an "
                f"evaluation needs at least {MIN_IMAGES}: give more images in data.source, or "
                "another data.heldout_fraction"
            )


def _train_on_cluster(config: GanConfig, dataset: Dataset) -> str:
    """Train in a Ray task; return the URI.

    The run's workers have not started yet, so the task takes their CPUs, as far as one node has
    them.
    """
    connect()
    parallel = config.parallel
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max(
        (node.get("CPU", 0) for node in nodes if node.get("GPU", 0) >= parallel.gpu), default=0
    )
    cpus = max(parallel.cpus_per_worker, min(parallel.workers * parallel.cpus_per_worker, largest))
    task = ray.remote(num_cpus=cpus, num_gpus=int(parallel.gpu))(_train_and_publish)
    device = "cuda" if parallel.gpu else "cpu"
    try:
        uri: str = ray.get(task.remote(dataset, config.data.size, max(1, int(cpus)), device))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # its message, without the task's traceback around it
    # Another driver may have published one meanwhile; all runs take the one that is found first.
    return extractor_file.find(dataset.uri, config.data.size) or uri


def _train_and_publish(dataset: Dataset, size: int, threads: int, device: str) -> str:
    torch.set_num_threads(threads)
    content = extractor_file.pack(*extractor_training.train(dataset, size, device))
    return extractor_file.publish(content, dataset.uri, size)

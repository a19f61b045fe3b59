"""Download data sets from the Hugging Face hub."""

from pathlib import Path


def download_parquet(name: str) -> Path:
    """Download a data set's parquet files once, into the hub client's cache.

    The hub converts every data set to parquet under the revision refs/convert/parquet, as
    CONFIG/SPLIT/NNNN.parquet.

    Args:
        name: `owner/name`, or `owner/name:config` for one of its configs.

    Returns:
        The folder that holds CONFIG/.

    Raises:
        ValueError: there is no such data set, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    repository, _, config = name.partition(":")
    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset",
            revision="refs/convert/parquet",
            allow_patterns=f"{config or '*'}/**",
        )
    # The client raises a dozen unrelated types for a missing data set or network.
    except Exception as error:
        raise ValueError(
            f"data.source hf:{name} could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}): check the name and the network, or give local files"
        ) from error
    return Path(folder)

"""A run's copy in Weights & Biases: `--log.wandb online | offline`.

metrics.jsonl and samples/ are the record, and W&B has a copy: an error here costs a warning and
never ends training. Steps in W&B are the run's. W&B's step only increases, and a killed process
loses what it has not sent yet. A resumed run therefore goes through all earlier rows and samples
again, and logs those that W&B does not have.
"""

import html
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

from PIL import Image

from cluster import storage
from train.run.records import SAMPLE

logger = logging.getLogger(__name__)

FINISH_S = 60.0  # what is unsent after that stays in the run's folder, for `wandb sync`


def check_wandb(mode: str) -> None:
    """Check that W&B can be used as log.wandb says; "online" asks its server.

    Args:
        mode: "off", "online" or "offline".

    Raises:
        ValueError: W&B is not installed; or it is online, and the key is missing or invalid, or
            its server cannot be reached.
    """
    if mode == "off":
        return
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"log.wandb is {mode} and wandb is not installed: pip install wandb, or use "
            "--log.wandb off"
        ) from None
    if mode == "offline":
        return
    try:
        wandb.setup(settings=wandb.Settings(silent=True))
        known = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"log.wandb is online and the login to W&B failed ({reason}): check WANDB_API_KEY and "
            "the network, or use --log.wandb offline"
        ) from error
    finally:
        wandb.teardown()
    if not known:
        raise ValueError(
            "log.wandb is online and there is no key: set WANDB_API_KEY, run `wandb login`, or use "
            "--log.wandb offline"
        )


class Options(TypedDict):
    """What W&B is told about a run."""

    mode: Literal["online", "offline"]
    project: str
    name: str
    config: dict[str, Any]


class Mirror:
    """W&B's copy of a run, new or resumed.

    Args:
        run_uri: the run's folder. W&B's files are in its wandb/; where the folder is remote they
            are uploaded when the run ends.
        options: of the run.
        run_id: the same at each start of a run.
    """

    def __init__(self, run_uri: str, options: Options, run_id: str) -> None:
        self._run_uri = run_uri
        local = storage.local_path(run_uri)
        # Uploaded at the end only: W&B's service writes and renames files at any time.
        self._remote = storage.join(run_uri, "wandb") if local is None else None
        self._folder = local or Path(tempfile.mkdtemp(prefix="raykiln-wandb-"))
        self._run: Any = None  # a wandb.Run; W&B is imported late
        self._failed = False
        # Where a client of a language model is imported, W&B would advertise Weave on the terminal.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        with self._errors_as_warnings():
            import wandb

            _delete_offline_runs(run_uri)
            self._run = wandb.init(
                **options,
                id=run_id,
                dir=str(self._folder),
                resume="allow" if options["mode"] == "online" else None,
                # Otherwise a later recorder in this process would get this run again, even a
                # failed one.
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True, console="off", symlink=False, finish_timeout=FINISH_S
                ),
            )

    def metrics(self, step: int, time: float, values: dict[str, float]) -> None:
        """Log metrics of a step; calls for one step become one row in W&B.

        Args:
            step: of the run.
            time: Unix, seconds.
            values: by metric.
        """
        with self._errors_as_warnings():
            self._log(step, {"_timestamp": time, **values})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Log a sample."""
        with self._errors_as_warnings():
            import wandb

            self._log(step, {name: wandb.Image(image)})

    def text(self, step: int, name: str, content: str) -> None:
        """Log a sample of text, with its line breaks."""
        with self._errors_as_warnings():
            import wandb

            self._log(step, {name: wandb.Html(f"<pre>{html.escape(content)}</pre>", inject=False)})

    def replay(self, rows: list[dict[str, float]], start: int) -> None:
        """Log what the record has up to step `start`.

        Args:
            rows: of metrics.jsonl; the samples are read from the run's folder.
            start: the step resumed from.
        """
        with self._errors_as_warnings():
            names = storage.names(storage.join(self._run_uri, "samples"))
            samples = [match for name in names if (match := SAMPLE.fullmatch(name))]
            # A step's rows come after its samples, so that the step has the time of the rows.
            recorded: list[tuple[int, dict[str, float] | re.Match[str]]] = [
                *((int(sample["step"]), sample) for sample in samples),
                *((int(row["step"]), row) for row in rows),
            ]
            for step, entry in sorted(recorded, key=lambda pair: pair[0]):
                if step > start:
                    return
                if isinstance(entry, re.Match):
                    self._replay_sample(step, entry)
                else:
                    clock = {"step", "time"}
                    values = {key: value for key, value in entry.items() if key not in clock}
                    self.metrics(step, entry["time"], values)

    def _replay_sample(self, step: int, sample: re.Match[str]) -> None:
        content = storage.read_bytes(storage.join(self._run_uri, "samples", sample[0]))
        if sample["suffix"] == "png":
            self.image(step, sample["name"], Image.open(io.BytesIO(content)))
        else:
            self.text(step, sample["name"], content.decode())

    def close(self) -> None:
        """Send what is left and end W&B's service process."""
        with self._errors_as_warnings():
            if self._run is not None:
                self._run.finish()
        with self._errors_as_warnings():
            import wandb

            wandb.teardown()
        if self._remote is not None:
            with self._errors_as_warnings():
                storage.upload(self._folder / "wandb", self._remote)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _log(self, step: int, values: dict[str, object]) -> None:
        # Steps before W&B's own start are there already.
        if self._run is not None and step >= self._run.starting_step:
            self._run.log(values, step=step)

    @contextmanager
    def _errors_as_warnings(self) -> Iterator[None]:
        """Log the first error as a warning and send nothing more."""
        try:
            yield
        # W&B's errors have no common type, and its teardown exits where its service has died.
        except (Exception, SystemExit) as error:
            if not self._failed:
                reason = (str(error) or repr(error)).splitlines()[0]
                logger.warning("Weights & Biases gets nothing more of this run: %s", reason)
            self._run, self._failed = None, True


def _delete_offline_runs(run_uri: str) -> None:
    """Delete the offline files of a run's earlier starts.

    This start writes all of it again, and `wandb sync` sends every file that it finds.
    """
    for name in storage.names(storage.join(run_uri, "wandb")):
        if name.startswith("offline-run-"):
            storage.delete(storage.join(run_uri, "wandb", name))

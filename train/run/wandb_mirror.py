"""A run's copy in Weights & Biases: `--log.wandb online | offline`.

metrics.jsonl and samples/ are the record, W&B has a copy: what goes wrong here costs a warning, never training.
Its steps are ours. W&B's count of steps only goes up and a killed process loses what it had not sent yet, so a resumed run
first writes again what the record has up to its start, of which W&B takes what it lacks.
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
from typing import Any

from PIL import Image

from cluster import storage

logger = logging.getLogger(__name__)

SAMPLE = re.compile(r"(?P<tag>.+)_(?P<step>\d+)\.(?P<kind>png|txt)")
FINISH_S = 60.0  # what is still unsent then stays in the run's folder, for `wandb sync`


def check_wandb(mode: str) -> None:
    """Whether W&B can be used as log.wandb says: "off", "online" or "offline". Online asks its server.

    Raises:
        ValueError: it is not installed; or it is to be online and has no key, a wrong one, or no way to its server.
    """
    if mode == "off":
        return
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"log.wandb is {mode} and wandb is not installed: pip install wandb, or use --log.wandb off"
        ) from None
    if mode == "offline":
        return
    try:
        wandb.setup(settings=wandb.Settings(silent=True))
        known = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        raise ValueError(
            f"log.wandb is online and W&B does not let us in ({str(error).splitlines()[0].rstrip('.')}): "
            "check WANDB_API_KEY and the way there, or use --log.wandb offline"
        ) from error
    finally:
        wandb.teardown()
    if not known:
        raise ValueError(
            "log.wandb is online and there is no key: set WANDB_API_KEY, run `wandb login`, or use --log.wandb offline"
        )


class Mirror:
    """W&B's run, begun or gone on with.

    Args:
        run_uri: the run's folder; W&B's files are in its wandb/, from the end of the run on where it is remote.
        options: mode ("online" or "offline"), project, name, config, and id: the same at each start of a run.
    """

    def __init__(self, run_uri: str, options: dict[str, Any]) -> None:
        self._run_uri = run_uri
        local = storage.local_path(run_uri)
        # Not uploaded as it grows: its service writes and renames in it as it likes.
        self._remote = storage.join(run_uri, "wandb") if local is None else None
        self._folder = local or Path(tempfile.mkdtemp(prefix="raykiln-wandb-"))
        self._run: Any = None
        self._lost = False
        # Weave would recommend itself on the terminal where another client of language models is imported.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        with self._costing_nothing():
            import wandb

            _forget(run_uri)
            self._run = wandb.init(
                **options,
                dir=str(self._folder),
                resume="allow" if options["mode"] == "online" else None,
                reinit="create_new",  # never wandb.run: a dead one would be given again to the next recorder of the process
                settings=wandb.Settings(
                    silent=True, console="off", symlink=False, finish_timeout=FINISH_S
                ),
            )

    def scalars(self, step: int, time: float, values: dict[str, float]) -> None:
        """Measurements of a step at a time (Unix, seconds); what comes for one step is one row in W&B."""
        with self._costing_nothing():
            self._log(step, {"_timestamp": time, **values})

    def image(self, step: int, tag: str, picture: Image.Image) -> None:
        """A picture."""
        with self._costing_nothing():
            import wandb

            self._log(step, {tag: wandb.Image(picture)})

    def text(self, step: int, tag: str, content: str) -> None:
        """Text, with its line breaks."""
        with self._costing_nothing():
            import wandb

            self._log(step, {tag: wandb.Html(f"<pre>{html.escape(content)}</pre>", inject=False)})

    def write_again(self, rows: list[dict[str, float]], start: int) -> None:
        """What the record has up to the step `start`: rows of metrics.jsonl, and the run's samples."""
        with self._costing_nothing():
            samples = [
                found
                for name in storage.names(storage.join(self._run_uri, "samples"))
                if (found := SAMPLE.fullmatch(name))
            ]
            recorded: list[tuple[int, dict[str, float] | re.Match[str]]] = [
                *((int(sample["step"]), sample) for sample in samples),
                *(
                    (int(row["step"]), row) for row in rows
                ),  # after a step's samples: its time is the rows'
            ]
            for step, entry in sorted(recorded, key=lambda pair: pair[0]):
                if step > start:
                    return
                if isinstance(entry, dict):
                    self.scalars(
                        step,
                        entry["time"],
                        {tag: value for tag, value in entry.items() if tag not in {"step", "time"}},
                    )
                else:
                    self._sample_again(step, entry)

    def _sample_again(self, step: int, sample: re.Match[str]) -> None:
        content = storage.read_bytes(storage.join(self._run_uri, "samples", sample[0]))
        if sample["kind"] == "png":
            self.image(step, sample["tag"], Image.open(io.BytesIO(content)))
        else:
            self.text(step, sample["tag"], content.decode())

    def close(self) -> None:
        """Sends what is left and ends W&B's service process."""
        with self._costing_nothing():
            if self._run is not None:
                self._run.finish()
        with self._costing_nothing():
            import wandb

            wandb.teardown()
        if self._remote is not None:
            with self._costing_nothing():
                storage.upload(self._folder / "wandb", self._remote)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if (
            self._run is not None and step >= self._run.starting_step
        ):  # what it has from before the resume, it has
            self._run.log(values, step=step)

    @contextmanager
    def _costing_nothing(self) -> Iterator[None]:
        try:
            yield
        except (
            Exception,
            SystemExit,
        ) as error:  # of many unrelated types; its teardown exits where its service has died
            if not self._lost:
                logger.warning(
                    "Weights & Biases gets nothing more of this run: %s",
                    (str(error) or repr(error)).splitlines()[0],
                )
            self._run, self._lost = None, True


def _forget(run_uri: str) -> None:
    """Deletes the offline files of a run's earlier starts: this one will hold it all, and `wandb sync` sends what it finds."""
    for name in storage.names(storage.join(run_uri, "wandb")):
        if name.startswith("offline-run-"):
            storage.delete(storage.join(run_uri, "wandb", name))

"""The whole road on this machine: `python -m cluster demo` (or `make demo`).

Starts a Ray cluster of its own, and on it runs the very commands that the README names: trains a GPT and a
WGAN-GP, exports both, serves both, asks both over HTTP. Text, pictures, curves and summary.json are left in
the demo's folder. Whatever was started is ended, after Ctrl-C or a closed terminal too.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from PIL import Image
from rich.console import Console
from rich.table import Table

from cluster import local, machine, storage
from cluster.demo import browser

PROMPT = "**HAMLET**  \nTo be, or "
PICTURES_PER_CLASS = 8
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, `kill`, a terminal that closes


class Demo:
    """One run of the demo.

    Args:
        folder: where everything is left; it is a storage of its own, apart from the user's runs and models.
        preset: gpt-<preset> and gan-<preset> are trained: "demo", or "tiny", which takes seconds and is not worth looking at.
    """

    def __init__(self, folder: Path, preset: str) -> None:
        self.folder, self.preset = folder.absolute(), preset
        self.screen = Console(highlight=False)
        self.legs: dict[str, float] = {}
        self.stamp = time.strftime("%Y%m%d-%H%M%S")
        self.environment = dict(os.environ)

    # ---------------------------------------------------------------- the story

    def run(self, stay: bool) -> dict[str, Any]:
        """Goes the road to its end; with `stay`, the page stays up until Ctrl-C. Returns what summary.json holds."""
        begun = time.monotonic()
        runs = {kind: f"demo-{kind}-{self.stamp}" for kind in ("gpt", "gan")}
        try:
            with self.leg("start a Ray cluster"):
                # Two workers train at once, and later two models and their gateway are served: two logical CPUs at least.
                head, _ = local.up(str(self.folder), num_cpus=max(2, os.cpu_count() or 1))
                head.join(self.environment)
                self.say(f"its dashboard: {head.dashboard.url} (token in {head.home / 'token'})")
            for kind, what in (
                ("gpt", "a GPT on Shakespeare's plays"),
                ("gan", "a WGAN-GP on Fashion-MNIST"),
            ):
                with self.leg(f"train {what}"):
                    self.command(
                        "train", kind, "--config", f"{kind}-{self.preset}", "--run.name", runs[kind]
                    )
                with self.leg(f"export the {kind}"):
                    self.command("train", "export", runs[kind])
            port = machine.free_port(None, 8000)
            with self.leg("serve both"):
                self.command("serve", "up", "--detach", "--port", str(port))
            with self.leg("ask both over HTTP"):
                try:
                    answers = self.ask(f"http://127.0.0.1:{port}")
                except httpx.HTTPError as error:
                    raise ValueError(
                        f"the demo stopped: the endpoint did not answer as it should ({error})"
                    ) from error
            summary = self.summarise(runs, answers, time.monotonic() - begun)
            self.show(summary, port)
            if stay:
                self.screen.print(
                    f"\nThe studio page is at [bold]http://localhost:{port}[/] until you press Ctrl-C."
                )
                signal.pause()
            return summary
        finally:
            self.end()

    def ask(self, url: str) -> dict[str, Any]:
        """Text as it streams, a sheet with a row of pictures a class, the page; all left in the folder."""
        # The proxy that a company's environment names is not the way to one's own machine.
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            models = {
                model["kind"]: model
                for model in client.get("/v1/models").raise_for_status().json()["data"]
            }
            # A token is a byte at least: this many fit into the context whatever the tokenizer makes of the prompt.
            room = models["gpt"]["model"]["context"] - len(PROMPT.encode())
            text, seconds, tokens = self._stream_text(client, min(200, room))
            (self.folder / "text.txt").write_text(PROMPT + text, encoding="utf-8")
            begun = time.monotonic()
            rows = self._draw_rows(client, models["gan"]["model"]["class_names"] or [None])
            picture_seconds = time.monotonic() - begun
        _sheet(rows).save(self.folder / "pictures.png")
        page = self._photograph(f"{url}/?run=1&seed=7")
        return {
            "text": PROMPT + text,
            "tokens_per_s": round(tokens / seconds, 1),
            "pictures": sum(map(len, rows)),
            "pictures_per_s": round(sum(map(len, rows)) / picture_seconds, 1),
            "page": page,
        }

    def _stream_text(self, client: httpx.Client, max_tokens: int) -> tuple[str, float, int]:
        body = {
            "prompt": PROMPT,
            "max_tokens": max_tokens,
            "temperature": 0.7,
            "top_k": 50,
            "seed": 7,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begun, text, tokens = time.monotonic(), "", 0
        self.screen.print(PROMPT, end="", markup=False, style="dim")
        with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                message = json.loads(line.removeprefix("data: "))
                if "error" in message:
                    raise ValueError(
                        f"the demo stopped: the endpoint broke off its text ({message['error']['message']})"
                    )
                tokens = (message.get("usage") or {}).get("completion_tokens", tokens)
                for choice in message["choices"]:
                    text += choice["text"]
                    self.screen.print(choice["text"], end="", markup=False)
        self.screen.print()
        return text, time.monotonic() - begun, tokens

    def _draw_rows(
        self, client: httpx.Client, classes: list[str | None]
    ) -> list[list[Image.Image]]:
        rows: list[list[Image.Image]] = []
        for number, label in enumerate(classes):
            body = {
                "n": PICTURES_PER_CLASS,
                "seed": 100 + number,
                **({"label": label} if label is not None else {}),
            }
            found = (
                client.post("/v1/images/generations", json=body).raise_for_status().json()["data"]
            )
            rows.append(
                [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in found]
            )
        return rows

    def _photograph(self, url: str) -> str | None:
        """Save a screenshot of the page with its text and images, or log why there is none."""
        path = self.folder / "page.png"
        ready = (
            "return document.getElementById('finish-reason').textContent !== '–' "
            "&& !document.getElementById('interpolation').hidden"
        )
        try:
            browser.screenshot(url, ready, path)
        except RuntimeError as error:
            self.say(f"no screenshot of the page was taken: {error}")
            return None
        return str(path)

    # ---------------------------------------------------------------- what is left behind

    def summarise(
        self, runs: dict[str, str], answers: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Gathers what was measured, and writes it down."""
        measured = {
            kind: storage.read_json(self.folder / "runs" / name / "summary.json")["metrics"]
            for kind, name in runs.items()
        }
        for kind, name in runs.items():
            shutil.copy(
                self.folder / "runs" / name / "curves.png", self.folder / f"curves-{kind}.png"
            )
        summary = {
            "seconds": round(seconds, 1),
            "legs_s": self.legs,
            "heldout_bits_per_byte": measured["gpt"]["heldout_bits_per_byte"],
            **{
                tag: measured["gan"][tag]
                for tag in (
                    "heldout_frechet_distance",
                    "heldout_frechet_distance_baseline",
                    "heldout_recall",
                )
            },
            "train_tokens_per_s": measured["gpt"]["tokens_per_s"],
            "train_images_per_s": measured["gan"]["images_per_s"],
            "served_tokens_per_s": answers["tokens_per_s"],
            "served_pictures_per_s": answers["pictures_per_s"],
            "text": answers["text"],
            "files": {
                "text": str(self.folder / "text.txt"),
                "pictures": str(self.folder / "pictures.png"),
                "curves": [str(self.folder / f"curves-{kind}.png") for kind in runs],
                "reports": [
                    str(self.folder / "runs" / name / "report.md") for name in runs.values()
                ],
                "page": answers["page"],
            },
            "runs": runs,
        }
        storage.write_json(self.folder / "summary.json", summary)
        return summary

    def show(self, summary: dict[str, Any], port: int) -> None:
        table = Table(title=f"The whole road in {summary['seconds']:.0f} s", show_header=False)
        for leg, seconds in self.legs.items():
            table.add_row(leg, f"{seconds:.0f} s")
        table.add_section()
        table.add_row(
            "held-out text",
            f"{summary['heldout_bits_per_byte']:.2f} bits a byte (four plays it never saw)",
        )
        table.add_row(
            "held-out pictures",
            f"Frechet distance {summary['heldout_frechet_distance']:.2f} ({summary['heldout_frechet_distance_baseline']:.2f} between real and real), "
            f"recall {summary['heldout_recall']:.2f}",
        )
        table.add_row(
            "training",
            f"{summary['train_tokens_per_s']:,.0f} tokens/s, {summary['train_images_per_s']:,.0f} images/s",
        )
        table.add_row(
            "serving",
            f"{summary['served_tokens_per_s']:,.0f} tokens/s to one reader, {summary['served_pictures_per_s']:,.0f} pictures/s",
        )
        table.add_section()
        files = summary["files"]
        table.add_row("text", _short(files["text"]))
        table.add_row("pictures", _short(files["pictures"]))
        table.add_row("curves", "  ".join(map(_short, files["curves"])))
        table.add_row(
            "page",
            _short(files["page"])
            if files["page"]
            else f"python -m serve up --storage {_short(str(self.folder))}",
        )
        table.add_row("all of it", _short(str(self.folder / "summary.json")))
        self.screen.print(table)

    # ---------------------------------------------------------------- how it is told and done

    @contextmanager
    def leg(self, what: str) -> Iterator[None]:
        self.screen.print(f"\n[bold cyan]== {what}[/]")
        begun = time.monotonic()
        yield
        self.legs[what] = round(time.monotonic() - begun, 1)
        self.say(f"{self.legs[what]:.0f} s")

    def say(self, text: str) -> None:
        self.screen.print(f"   {text}", style="dim", markup=False)

    def command(self, *words: str) -> None:
        """Runs `python -m WORDS` on the demo's cluster as a user would, its output on this terminal.

        Raises:
            ValueError: the command failed; it has said why.
        """
        words = (*words, "--storage", str(self.folder))
        self.screen.print(
            f"$ python -m {' '.join(_short(word) for word in words)}", style="dim", markup=False
        )
        code = subprocess.run(
            [sys.executable, "-m", *words], env=self.environment, check=False
        ).returncode
        if code:
            raise ValueError(
                f"the demo stopped: `python -m {words[0]} {words[1]}` ended with exit code {code}, see above"
            )

    def end(self) -> None:
        """Ends the demo's cluster; a second Ctrl-C must not leave half of it."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
        try:
            local.down(str(self.folder))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(folder: Path, stay: bool | None = None, preset: str = "demo") -> int:
    """The demo; it stays up at its end when it was started from a terminal, unless `stay` says otherwise."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` leaves SIGHUP
            signal.signal(number, _interrupt)
    demo = Demo(folder, preset)
    demo.folder.mkdir(parents=True, exist_ok=True)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        demo.run(at_terminal if stay is None else stay)
    except KeyboardInterrupt:
        if "ask both over HTTP" not in demo.legs:
            raise
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """The pictures side by side, doubled so that one sees them; one row a class."""
    width, height = rows[0][0].size
    scale, gap = max(1, 64 // width), 4
    sheet = Image.new(
        "RGB",
        (len(rows[0]) * (width * scale + gap) + gap, len(rows) * (height * scale + gap) + gap),
        "white",
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            large = picture.convert("RGB").resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            sheet.paste(large, (gap + x * (width * scale + gap), gap + y * (height * scale + gap)))
    return sheet


def _short(path: str) -> str:
    """A path as one would type it here."""
    here = str(Path.cwd())
    return re.sub(rf"^{re.escape(here)}/", "", path)

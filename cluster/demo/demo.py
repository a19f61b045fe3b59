"""The demo, from data to endpoint on this machine: `python -m cluster demo` or `make demo`.

It starts a Ray cluster of its own and runs the commands of docs/start/step-by-step.md: train a GPT
and a WGAN-GP, export both, serve both, send requests over HTTP. Text, images, curves and
summary.json stay in the demo's folder. Every process that it starts is ended, also after Ctrl-C or
when the terminal closes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from urllib.parse import urlencode

import httpx
from rich.console import Console

from cluster import cli, local, machine
from cluster.demo import browser, client
from cluster.demo import summary as summaries

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_STAGE = "ask both over HTTP"  # the results are complete after it


class Demo:
    """One run of the demo.

    Args:
        folder: a storage of its own, apart from the user's runs and models.
        preset: "demo" or "tiny": the presets gpt-<preset> and gan-<preset> are trained.
    """

    def __init__(self, folder: Path, preset: str) -> None:
        self.folder, self.preset = folder.absolute(), preset
        self.screen = Console(highlight=False)
        self.stages_s: dict[str, float] = {}
        self.stamp = time.strftime("%Y%m%d-%H%M%S")
        self.environment = dict(os.environ)

    def run(self, stay: bool) -> None:
        """Run all stages and write the results.

        Args:
            stay: keep serving until Ctrl-C.
        """
        begun = time.monotonic()
        runs = {kind: f"demo-{kind}-{self.stamp}" for kind in ("gpt", "gan")}
        try:
            with self.stage("start a Ray cluster"):
                # Two CPUs at least: for two training workers, later for two models and a gateway.
                num_cpus = max(2, os.cpu_count() or 1)
                head, _ = local.up(str(self.folder), num_cpus=num_cpus)
                head.join(self.environment)
                token = head.folder / "token"
                self.log(f"its dashboard: {head.dashboard.url} (token in {token})")
            for kind, what in (
                ("gpt", "a GPT on Shakespeare's plays"),
                ("gan", "a WGAN-GP on Fashion-MNIST"),
            ):
                with self.stage(f"train {what}"):
                    self.command(
                        "train", kind, "--config", f"{kind}-{self.preset}", "--run.name", runs[kind]
                    )
                with self.stage(f"export the {kind}"):
                    self.command("train", "export", runs[kind])
            port = machine.free_port(8000)
            with self.stage("serve both"):
                self.command("serve", "up", "--detach", "--port", str(port))
            with self.stage(LAST_STAGE):
                responses, page = self.send_requests(f"http://127.0.0.1:{port}")
            summary = summaries.write(
                self.folder, runs, self.stages_s, time.monotonic() - begun, responses, page
            )
            self.screen.print(summaries.table(summary, self.folder))
            if stay:
                self.screen.print(
                    f"\nThe studio page is at [bold]http://localhost:{port}[/] until you press "
                    "Ctrl-C."
                )
                signal.pause()
        finally:
            self.end()

    def send_requests(self, url: str) -> tuple[client.Responses, Path | None]:
        """Send requests to both models, and take a screenshot of the page where a browser is
        installed."""
        self.screen.print(client.PROMPT, end="", markup=False, style="dim")
        try:
            responses = client.send_requests(
                url, lambda text: self.screen.print(text, end="", markup=False)
            )
        except httpx.HTTPError as error:
            raise ValueError(f"the demo failed: a request failed ({error})") from error
        self.screen.print()
        query = urlencode({"run": 1, "seed": 7, "prompt": client.PROMPT})
        return responses, self._photograph(f"{url}/?{query}")

    def _photograph(self, url: str) -> Path | None:
        """Save a screenshot of the page with its text and images, or log why there is none."""
        path = self.folder / "page.png"
        ready = (
            "return document.getElementById('finish-reason').textContent !== '–' "
            "&& !document.getElementById('interpolation').hidden"
        )
        try:
            browser.screenshot(url, ready, path)
        except RuntimeError as error:
            self.log(f"no screenshot of the page was taken: {error}")
            return None
        return path

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print a stage's name and measure its seconds."""
        self.screen.print(f"\n[bold cyan]== {name}[/]")
        begun = time.monotonic()
        yield
        self.stages_s[name] = round(time.monotonic() - begun, 1)
        self.log(f"{self.stages_s[name]:.0f} s")

    def log(self, text: str) -> None:
        self.screen.print(f"   {text}", style="dim", markup=False)

    def command(self, *words: str) -> None:
        """Run `python -m WORDS` on the demo's cluster as a user would, its output on this terminal.

        Raises:
            ValueError: the command failed; its own output says why.
        """
        words = (*words, "--storage", str(self.folder))
        shown = " ".join(cli.typed(word) for word in words)
        self.screen.print(f"$ python -m {shown}", style="dim", markup=False)
        code = subprocess.run(
            [sys.executable, "-m", *words], env=self.environment, check=False
        ).returncode
        if code:
            raise ValueError(
                f"the demo failed: `python -m {words[0]} {words[1]}` ended with exit code {code}, "
                "see its output above"
            )

    def end(self) -> None:
        """End the demo's cluster; a second Ctrl-C must not leave half of it running."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        try:
            local.down(str(self.folder))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(folder: Path, stay: bool | None = None, preset: str = "demo") -> int:
    """Run the demo and return its exit code.

    Args:
        folder: where its files are left.
        stay: keep serving until Ctrl-C; None: where it was started from a terminal.
        preset: "demo" or "tiny".
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP: leave it so
            signal.signal(number, _interrupt)
    demo = Demo(folder, preset)
    demo.folder.mkdir(parents=True, exist_ok=True)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        demo.run(at_terminal if stay is None else stay)
    except KeyboardInterrupt:
        if LAST_STAGE not in demo.stages_s:
            raise
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

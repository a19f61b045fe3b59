"""The studio page in a real browser: headless Chromium through chromedriver's WebDriver protocol, over the real ingress and models."""

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from models import registry
from serve.deployments import Pictures, Text
from serve.engine import Chunk
from serve.errors import Rejected
from serve.ingress import Drawing, build_app
from serve.schemas import CompletionRequest, ImagesRequest, InterpolationsRequest, Model
from tests import bundles
from tests.conftest import free_port

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, https://www.w3.org/TR/webdriver2/#elements
TOKEN_S = 0.03  # slow enough to be watched, and to be stopped
CHROMIUM = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1360,1250",
]


class Here:
    """The two deployments' classes as the ingress sees them, without Ray in between."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    async def describe(self) -> Model:
        return await self.replica.describe()

    async def sample(self) -> bytes | None:
        return await self.replica.sample()

    async def complete(self, request: CompletionRequest, client: str) -> tuple[str, list[Chunk]]:
        return raised(await self.replica.complete(request, client))

    async def stream(self, request: CompletionRequest, client: str) -> AsyncGenerator[tuple[str, Chunk], None]:
        async with contextlib.aclosing(self.replica.stream(request, client)) as answers:
            async for answer in answers:
                yield raised(answer)

    async def draw(self, request: ImagesRequest) -> tuple[str, Drawing]:
        return raised(await self.replica.draw(request))

    async def interpolate(self, request: InterpolationsRequest) -> tuple[str, Drawing]:
        return raised(await self.replica.interpolate(request))


def raised(answer: Any) -> Any:
    if isinstance(answer, Rejected):
        raise answer
    return answer


@pytest.fixture(scope="module")
def replica() -> Text:
    return Text(slots=4, threads=1, timeout_s=60)


@pytest.fixture(scope="module")
def server(replica: Text, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The ingress over tiny models, and a second one at port + 1 that serves text only."""
    folder = tmp_path_factory.mktemp("page")
    root = str(folder / "models")
    registry.publish(root, "gpt", bundles.tiny_gpt_bundle(folder / "gpt"))
    registry.publish(root, "dcgan", bundles.tiny_gan_bundle(folder / "gan", num_classes=3))
    port = free_port()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        pictures = Pictures(threads=1)
        await replica.reconfigure({"uri": registry.resolve(root, "gpt")[2]})
        await pictures.reconfigure({"uri": registry.resolve(root, "dcgan")[2]})
        slow_down(replica.session)
        for app, at in ((build_app(Here(replica), Here(pictures)), port), (build_app(Here(replica), None), port + 1)):
            servers.append(uvicorn.Server(uvicorn.Config(app, port=at, log_level="warning")))
        await asyncio.gather(*(server.serve() for server in servers))

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while len(servers) < 2 or not all(server.started for server in servers):
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    for server in servers:
        server.should_exit = True
    thread.join(20)


def slow_down(session: Any) -> None:
    decode = session.decode

    def slow(*arguments: Any) -> Any:
        time.sleep(TOKEN_S)
        return decode(*arguments)

    session.decode = slow


class Browser:
    """As much of WebDriver as these tests need."""

    def __init__(self, driver_url: str) -> None:
        self.http = httpx.Client(base_url=driver_url, timeout=60)
        options = {"args": [*CHROMIUM, f"--user-data-dir={tempfile.mkdtemp(prefix='raykiln-chromium-')}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.profile = options["args"][-1].partition("=")[2]
        self.http.base_url = f"{driver_url}/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        response = self.http.request(method, path, json=body)
        assert response.status_code == 200, response.text
        return response.json()["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def find(self, selector: str) -> list[str]:
        found = self._call("POST", "/elements", {"using": "css selector", "value": selector})
        return [element[ELEMENT] for element in found]

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self.find(selector)[0]}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._call("POST", f"/element/{self.find(selector)[0]}/value", {"text": text})

    def text(self, selector: str) -> str:
        return self.run(f"return document.querySelector({selector!r}).textContent")

    def name(self, element: str) -> str:
        return self._call("GET", f"/element/{element}/computedlabel")

    def markup(self, element: str) -> str:
        return self._call("GET", f"/element/{element}/property/outerHTML")[:200]

    def resize(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """What the console has: blocked by the page's policy, not found, thrown."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while not (value := condition()):
            assert time.monotonic() < deadline, (self.text("#notice"), self.complaints())
            time.sleep(0.02)
        return value

    def close(self) -> None:
        self._call("DELETE", str(self.http.base_url).rstrip("/"))
        self.http.close()
        shutil.rmtree(self.profile, ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        missing = "the page is NOT tested: there is no chromium and chromedriver here (apt-get install chromium chromium-driver)"
        (pytest.fail if os.environ.get("RAYKILN_EXPECT_CHROMIUM") == "1" else pytest.skip)(missing)
    port = free_port()
    process = psutil.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=10)) as http:
            http.get("/status")
        browser = Browser(f"http://127.0.0.1:{port}")
        yield browser
        browser.close()
    finally:
        for left in [*process.children(recursive=True), process]:
            left.kill()
        process.wait(10)


def written(browser: Browser) -> str:
    browser.until(lambda: browser.text("#reason") != "–")
    return browser.text("#generated")


def test_text_appears_as_it_is_written(browser: Browser, server: str) -> None:
    browser.open(server)
    browser.until(lambda: not browser.run("return document.getElementById('text').hidden"))
    browser.type("#prompt", "Now is")
    browser.type("#text-seed", "5")
    browser.click("#write")
    early = browser.until(lambda: browser.text("#generated"))
    assert browser.run("return document.getElementById('written').ariaBusy") == "true"
    whole = written(browser)
    assert whole.startswith(early)
    assert len(whole) > len(early)
    assert browser.text("#given") == "Now is"
    asked = browser.run("return [Number(document.getElementById('tokens').textContent), document.getElementById('used-seed').textContent]")
    request = {"prompt": "Now is", "max_tokens": asked[0], "seed": 5}
    assert httpx.post(f"{server}/v1/completions", json=request, timeout=30).json()["choices"][0]["text"] == whole
    assert asked[1] == "5"
    rate = int(browser.text("#rate"))
    assert 0 < rate <= 1 / TOKEN_S


def test_stop_ends_the_model_s_work(browser: Browser, server: str, replica: Text) -> None:
    browser.open(f"{server}/?prompt=Now&seed=5&run=text")
    browser.until(lambda: browser.text("#generated"))
    browser.click("#stop")
    assert browser.text("#reason") == "stop button"
    engine = replica.engine
    assert engine is not None
    browser.until(lambda: engine.status()["running"] == 0)
    shown = browser.text("#generated")
    assert len(shown) > 0
    assert int(browser.text("#tokens")) < 50
    assert browser.text("#generated") == shown
    assert browser.run("return document.getElementById('stop').disabled")


def test_pictures_of_a_seed_and_a_class(browser: Browser, server: str) -> None:
    browser.open(f"{server}/?seed=7&run=pictures")
    browser.until(lambda: len(browser.find("#grid img")) == 16)
    sources = "return [...document.querySelectorAll('#grid img')].map((image) => image.src.split(',')[1])"
    expected = httpx.post(f"{server}/v1/images/generations", json={"seed": 7, "n": 16}).json()["data"]
    assert browser.run(sources) == [picture["b64_json"] for picture in expected]
    options = browser.run("return [...document.getElementById('label').options].map((option) => option.text)")
    assert options == ["all in turn", "class 0", "class 1", "class 2"]
    browser.run("document.getElementById('label').value = 'class 2'; document.getElementById('n').value = '4'")
    browser.click("#draw")
    browser.until(lambda: len(browser.find("#grid img")) == 4)
    assert browser.run("return [...document.querySelectorAll('#grid img')].map((image) => image.alt)") == ["class 2"] * 4
    assert browser.run("return document.querySelector('#grid a').download") == "dcgan-1-seed7-0.png"
    browser.until(lambda: browser.run("return document.getElementById('download').href.startsWith('data:image/png')"))
    browser.click("#next")
    browser.until(lambda: "seed 8" in browser.text("#picture-status"))


def test_the_address_reproduces_what_is_shown(browser: Browser, server: str) -> None:
    browser.open(f"{server}/?prompt=Now%20is%0A&max_tokens=5&temperature=1.5&run=1")
    text, address = written(browser), browser.run("return location.href")
    pictures = browser.until(lambda: browser.text("#picture-status"))
    browser.open(f"{address}&run=1")
    assert written(browser) == text
    assert browser.until(lambda: browser.text("#picture-status")).partition(" by ")[0] == pictures.partition(" by ")[0]


def test_what_the_server_refuses_is_shown(browser: Browser, server: str) -> None:
    browser.open(server)
    browser.until(lambda: not browser.run("return document.getElementById('text').hidden"))
    browser.run("document.getElementById('prompt').value = 'Now is the winter. '.repeat(40)")
    browser.click("#write")
    browser.until(lambda: "exceed the model's context of 64 tokens" in browser.text("#notice"))


def test_a_prompt_of_many_tokens_is_asked_again_for_less(browser: Browser, server: str) -> None:
    prompt = "ж" * 20  # 40 bytes, and as many tokens
    browser.open(f"{server}/?prompt={prompt}&max_tokens=60&seed=5&run=text")
    shown = written(browser)
    request = {"prompt": prompt, "max_tokens": 64 - 40, "seed": int(browser.text("#used-seed"))}
    assert httpx.post(f"{server}/v1/completions", json=request, timeout=30).json()["choices"][0]["text"] == shown


def test_a_kind_that_is_not_served_is_not_shown(browser: Browser, server: str) -> None:
    address, _, port = server.rpartition(":")
    browser.open(f"{address}:{int(port) + 1}/")
    browser.until(lambda: not browser.run("return document.getElementById('text').hidden"))
    assert browser.run("return document.getElementById('pictures').hidden")


def test_the_page_loads_nothing_from_elsewhere_and_complains_of_nothing(browser: Browser, server: str) -> None:
    browser.complaints()
    browser.open(f"{server}/?prompt=%3Cscript%3Ealert(1)%3C%2Fscript%3E&max_tokens=3&run=1")
    written(browser)
    loaded = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith((server, "data:")) for name in loaded), loaded
    assert browser.text("#given") == "<script>alert(1)</script>"
    assert browser.complaints() == []


def test_every_control_has_a_name_and_the_page_fits_a_phone(browser: Browser, server: str) -> None:
    browser.open(f"{server}/?seed=7&run=pictures")
    browser.until(lambda: len(browser.find("#grid img")) == 16)
    browser.until(lambda: not browser.run("return document.getElementById('download').hidden"))
    names = {browser.markup(control): browser.name(control) for control in browser.find("button, input, select, textarea, a")}
    assert [markup for markup, name in names.items() if not name] == []
    browser.resize(500, 900)  # the narrowest that Chromium's window gets
    try:
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.resize(1360, 1250)

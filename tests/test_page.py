"""The studio page in a real browser: headless Chromium through chromedriver's WebDriver protocol, over the real ingress and models."""

import asyncio
import base64
import io
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.demo.browser import Browser, is_installed, started
from cluster.machine import free_port
from models import registry
from serve.catalog import Catalog
from serve.ingress import build_app
from serve.replicas import Pictures, Text
from tests.support import bundles
from tests.support.fakes import Here

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, https://www.w3.org/TR/webdriver2/#elements
WINDOW = (1360, 1250)
TOKEN_S = 0.03  # slow enough to be watched, and to be stopped

OPEN_ALL = "for (const details of document.querySelectorAll('details')) details.open = true"
STATUS = {
    "deployments": {
        "Text": {"replicas": 1, "target": 2, "status": "UPSCALING"},
        "Pictures": {"replicas": 1, "target": 1, "status": "HEALTHY"},
    },
    "latency_ms": {
        "text_first_token": {"p50": 12.345, "p99": 40.1},
        "picture": {"p50": None, "p99": None},
    },
}
# The contrast of every text that is shown, by WCAG 2.2's definition (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio).
CONTRASTS = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => {
  const [r, g, b] = channels(color).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const opaque = (color) => (channels(color)[3] ?? 1) === 1;
const paper = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return opaque(color) || !element.parentElement ? color : paper(element.parentElement);
};
const texts = [...document.querySelectorAll("body *")].filter((element) =>
  element.checkVisibility() && !element.disabled && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
return texts.map((element) => {
  const [a, b] = [luminance(getComputedStyle(element).color), luminance(paper(element))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 120)];
});
"""


@pytest.fixture(scope="module")
def replica() -> Text:
    return Text(slots=4, threads=1, timeout_s=60)


@pytest.fixture(scope="module")
def server(replica: Text, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The ingress over tiny models, and a second one at port + 1 that serves text only and has no /status."""
    folder = tmp_path_factory.mktemp("page")
    root = str(folder / "models")
    for version in (1, 2):
        assert (
            registry.publish(root, "gpt", bundles.tiny_gpt_bundle(folder / f"gpt-{version}"))
            == version
        )
    registry.alias(root, "gpt", "staging", 2)
    registry.publish(root, "dcgan", bundles.tiny_gan_bundle(folder / "gan", num_classes=3))
    port = free_port()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        pictures = Pictures(threads=1)
        await replica.reconfigure({"uri": registry.resolve(root, "gpt/1")[2]})
        await pictures.reconfigure({"uri": registry.resolve(root, "dcgan")[2]})
        slow_down(replica.session)
        for images, told, at in ((Here(pictures), STATUS, port), (None, None, port + 1)):
            app = build_app(Here(replica), images, catalog=Catalog() if images else None)
            app.router.routes.insert(0, Route("/status", tell_status(told)))
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


def tell_status(told: dict[str, Any] | None) -> Callable[[Request], Awaitable[Response]]:
    async def status(_: Request) -> Response:
        return Response(status_code=404) if told is None else JSONResponse(told)

    return status


def slow_down(session: Any) -> None:
    decode = session.decode

    def slow(*arguments: Any) -> Any:
        time.sleep(TOKEN_S)
        return decode(*arguments)

    session.decode = slow


class Page(Browser):
    """What a person does and sees."""

    def find(self, selector: str) -> list[str]:
        found = self.call("POST", "/elements", {"using": "css selector", "value": selector})
        return [element[ELEMENT] for element in found]

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self.find(selector)[0]}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.call("POST", f"/element/{self.find(selector)[0]}/value", {"text": text})

    def text(self, selector: str) -> str:
        return self.run(f"return document.querySelector({selector!r}).textContent")

    def name(self, element: str) -> str:
        return self.call("GET", f"/element/{element}/computedlabel")

    def markup(self, element: str) -> str:
        return self.call("GET", f"/element/{element}/property/outerHTML")[:200]

    def resize(self, width: int, height: int) -> None:
        self.call("POST", "/window/rect", {"width": width, "height": height})

    def prefer(self, scheme: str) -> None:
        """light or dark; "": what the system has."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call(
            "POST",
            "/goog/cdp/execute",
            {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}},
        )

    def until(self, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
        try:
            return super().until(condition, timeout_s)
        except TimeoutError as error:
            raise AssertionError(
                f"the page says {self.text('#notice')!r}, its console {self.complaints()}"
            ) from error

    def complaints(self) -> list[str]:
        """What the console has: blocked by the page's policy, not found, thrown."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    if not is_installed():
        missing = "the page is NOT tested: there is no chromium and chromedriver here (apt-get install chromium chromium-driver)"
        (pytest.fail if os.environ.get("RAYKILN_EXPECT_CHROMIUM") == "1" else pytest.skip)(missing)
    with started(*WINDOW) as browser:
        yield Page(browser.http)


def written(browser: Page) -> str:
    browser.until(lambda: browser.text("#reason") != "–")
    return browser.text("#generated")


def test_text_appears_as_it_is_written(browser: Page, server: str) -> None:
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
    asked = browser.run(
        "return [Number(document.getElementById('tokens').textContent), document.getElementById('used-seed').textContent]"
    )
    request = {"prompt": "Now is", "max_tokens": asked[0], "seed": 5}
    assert (
        httpx.post(f"{server}/v1/completions", json=request, timeout=30).json()["choices"][0][
            "text"
        ]
        == whole
    )
    assert asked[1] == "5"
    rate = int(browser.text("#rate"))
    assert 0 < rate <= 1 / TOKEN_S


def test_every_control_reaches_the_server(browser: Page, server: str) -> None:
    asked: dict[str, Any] = {
        "prompt": "Now",
        "max_tokens": 12,
        "temperature": 1.5,
        "top_k": 20,
        "top_p": 0.6,
        "repetition_penalty": 1.4,
        "seed": 3,
    }
    browser.open(f"{server}/?{httpx.QueryParams(asked)}&run=text")
    whole = written(browser)
    assert (
        httpx.post(f"{server}/v1/completions", json=asked, timeout=30).json()["choices"][0]["text"]
        == whole
    )
    for left_out in ("top_p", "repetition_penalty"):
        others = {name: value for name, value in asked.items() if name != left_out}
        assert (
            httpx.post(f"{server}/v1/completions", json=others, timeout=30).json()["choices"][0][
                "text"
            ]
            != whole
        )
    browser.open(f"{server}/?{httpx.QueryParams(asked | {'stop': whole[4:6]})}&run=text")
    assert written(browser) == whole[: whole.index(whole[4:6])]
    assert browser.text("#reason") == "stop string or end of text"


def test_stop_ends_the_model_s_work(browser: Page, server: str, replica: Text) -> None:
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


def test_pictures_of_a_seed_and_a_class(browser: Page, server: str) -> None:
    browser.open(f"{server}/?seed=7&run=pictures")
    browser.until(lambda: len(browser.find("#grid img")) == 16)
    sources = (
        "return [...document.querySelectorAll('#grid img')].map((image) => image.src.split(',')[1])"
    )
    expected = httpx.post(f"{server}/v1/images/generations", json={"seed": 7, "n": 16}).json()[
        "data"
    ]
    assert browser.run(sources) == [picture["b64_json"] for picture in expected]
    options = browser.run(
        "return [...document.getElementById('label').options].map((option) => option.text)"
    )
    assert options == ["all in turn", "class 0", "class 1", "class 2"]
    browser.run(
        "document.getElementById('label').value = 'class 2'; document.getElementById('n').value = '4'"
    )
    browser.click("#draw")
    browser.until(lambda: len(browser.find("#grid img")) == 4)
    assert (
        browser.run("return [...document.querySelectorAll('#grid img')].map((image) => image.alt)")
        == ["class 2"] * 4
    )
    assert browser.run("return document.querySelector('#grid a').download") == "dcgan-1-seed7-0.png"
    browser.until(
        lambda: browser.run(
            "return document.getElementById('download').href.startsWith('data:image/png')"
        )
    )
    browser.click("#next")
    browser.until(lambda: "seed 8" in browser.text("#picture-status"))


def set_slider(browser: Page, selector: str, value: float) -> None:
    browser.run(
        f"const it = document.querySelector('{selector}'); it.value = {value}; it.dispatchEvent(new Event('input'))"
    )


def test_truncation_is_asked_for_where_the_slider_is_not_at_its_end(
    browser: Page, server: str
) -> None:
    browser.open(f"{server}/?seed=7&n=4&truncation=0.5&run=pictures")
    sources = (
        "return [...document.querySelectorAll('#grid img')].map((image) => image.src.split(',')[1])"
    )
    browser.until(lambda: len(browser.run(sources)) == 4)
    cut, whole = (
        [
            picture["b64_json"]
            for picture in httpx.post(
                f"{server}/v1/images/generations", json={"seed": 7, "n": 4, **more}
            ).json()["data"]
        ]
        for more in ({"truncation": 0.5}, {})
    )
    assert browser.run(sources) == cut != whole
    assert browser.text("#truncation-value") == "0.5"
    assert "truncation=0.5" in browser.run("return location.search")
    set_slider(browser, "#truncation", 3.1)
    assert browser.text("#truncation-value") == "off"
    browser.click("#draw")
    browser.until(lambda: browser.run(sources) == whole)
    assert "truncation" not in browser.run("return location.search")


def test_a_slider_leads_from_one_seed_to_another_by_keyboard(browser: Page, server: str) -> None:
    browser.open(f"{server}/?from=3&to=5&label=class%201&run=pictures")
    browser.until(lambda: not browser.run("return document.getElementById('way').hidden"))
    request = {"seed": 3, "to_seed": 5, "steps": 21, "label": 1}
    way = [
        picture["b64_json"]
        for picture in httpx.post(f"{server}/v1/images/interpolations", json=request).json()["data"]
    ]
    here = "return document.getElementById('here').src.split(',')[1]"
    assert browser.run(here) == way[10]
    for key, step, place in (
        ("\ue014", 11, "55 %"),
        ("\ue010", 20, "100 %"),
        ("\ue011", 0, "0 %"),
    ):  # right, end, home
        browser.type("#position", key)
        assert browser.run(here) == way[step]
        told = f"{place} of the way from seed 3 to seed 5"
        assert browser.run("return document.getElementById('position').ariaValueText") == told
        assert browser.run("return document.getElementById('here').alt") == f"Picture at {told}"
    assert browser.run(
        "const link = document.getElementById('download-here'); return [link.download, link.href.split(',')[1]]"
    ) == [
        "dcgan-1-seed3-to-5-0.png",
        way[0],
    ]
    strip = browser.run("return document.getElementById('download-strip').href.split(',')[1]")
    assert Image.open(io.BytesIO(base64.b64decode(strip))).size == (21 * 28, 28)


def test_what_is_served_is_shown_with_its_sample_replicas_and_latency(
    browser: Page, server: str
) -> None:
    browser.open(server)
    gpt, gan = ".card[data-kind=gpt]", ".card[data-kind=gan]"
    browser.until(lambda: browser.find(f"{gan} .live dd"))
    live = "return [...document.querySelectorAll('{} .live dd')].map((fact) => fact.textContent)"
    assert browser.run(live.format(gpt)) == ["1 of 2, upscaling", "12.35 ms (p50), 40.1 ms (p99)"]
    assert browser.run(live.format(gan)) == ["1, healthy"]
    assert (
        browser.until(lambda: browser.text(f"{gpt} pre"))
        == httpx.get(f"{server}/v1/models/gpt/sample").text
    )
    image = f"document.querySelector('{gan} figure img')"
    browser.run(f"{image}.scrollIntoView()")
    browser.until(lambda: browser.run(f"return {image}.naturalWidth > 28"))


def test_all_versions_are_set_side_by_side_with_their_samples(browser: Page, server: str) -> None:
    browser.open(server)
    browser.until(lambda: browser.find(".card[data-kind=gpt] .versions"))
    browser.click(".card[data-kind=gpt] summary")
    rows = "return [...document.querySelectorAll('.versions tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent.trim()))"
    newest, served = browser.until(lambda: browser.run(rows))
    assert (newest[0], served[0]) == ("2 staging", "1 served")
    browser.click(".versions tbody button")
    sample = httpx.get(f"{server}/v1/models/gpt/versions/2/sample").text
    assert browser.until(lambda: browser.text(".versions pre")) == sample


def test_the_keyboards_focus_stays_where_it_is_of_use(browser: Page, server: str) -> None:
    browser.open(f"{server}/?prompt=Now&run=text")
    browser.until(lambda: browser.text("#generated"))
    focus = "return document.activeElement.id"
    enter = "\ue007"
    browser.type("#stop", enter)
    assert (browser.text("#reason"), browser.run(focus)) == ("stop button", "write")
    browser.type("#draw", enter)
    browser.until(lambda: browser.find("#grid img"))
    assert browser.run(focus) == "draw"
    browser.type("#interpolate", enter)
    browser.until(lambda: not browser.run("return document.getElementById('way').hidden"))
    assert browser.run(focus) == "interpolate"


def test_a_browser_asks_whether_the_pages_files_have_changed(server: str) -> None:
    for path in ("/", "/page/studio.js"):
        response = httpx.get(f"{server}{path}")
        assert response.headers["cache-control"] == "no-cache"
    again = httpx.get(
        f"{server}/page/studio.js", headers={"If-None-Match": response.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser: Page, server: str, scheme: str) -> None:
    browser.prefer(scheme)
    try:
        browser.open(f"{server}/?prompt=Now&max_tokens=3&seed=7&run=1")
        written(browser)
        browser.until(lambda: not browser.run("return document.getElementById('way').hidden"))
        browser.run(OPEN_ALL)
        browser.until(lambda: browser.find(".versions tbody button"))
        browser.run(
            "document.getElementById('notice').hidden = false; document.getElementById('notice').textContent = 'Wrong'"
        )
        contrasts = browser.run(CONTRASTS)
        assert len(contrasts) > 50
        assert [(ratio, markup) for ratio, markup in contrasts if ratio < 4.5] == []
    finally:
        browser.prefer("")


def test_the_address_reproduces_what_is_shown(browser: Page, server: str) -> None:
    browser.open(f"{server}/?prompt=Now%20is%0A&max_tokens=5&temperature=1.5&run=1")
    text, address = written(browser), browser.run("return location.href")
    pictures = browser.until(lambda: browser.text("#picture-status"))
    browser.open(f"{address}&run=1")
    assert written(browser) == text
    assert (
        browser.until(lambda: browser.text("#picture-status")).partition(" by ")[0]
        == pictures.partition(" by ")[0]
    )


def test_what_the_server_refuses_is_shown(browser: Page, server: str) -> None:
    browser.open(server)
    browser.until(lambda: not browser.run("return document.getElementById('text').hidden"))
    browser.run("document.getElementById('prompt').value = 'Now is the winter. '.repeat(40)")
    browser.click("#write")
    browser.until(lambda: "exceed the model's context of 64 tokens" in browser.text("#notice"))


def test_a_prompt_of_many_tokens_is_asked_again_for_less(browser: Page, server: str) -> None:
    prompt = "ж" * 20  # 40 bytes, and as many tokens
    browser.open(f"{server}/?prompt={prompt}&max_tokens=60&seed=5&run=text")
    shown = written(browser)
    request = {"prompt": prompt, "max_tokens": 64 - 40, "seed": int(browser.text("#used-seed"))}
    assert (
        httpx.post(f"{server}/v1/completions", json=request, timeout=30).json()["choices"][0][
            "text"
        ]
        == shown
    )


def test_a_kind_that_is_not_served_is_not_shown(browser: Page, server: str) -> None:
    address, _, port = server.rpartition(":")
    browser.open(f"{address}:{int(port) + 1}/")
    browser.until(lambda: not browser.run("return document.getElementById('text').hidden"))
    assert browser.run("return document.getElementById('pictures').hidden")
    browser.until(lambda: browser.text(".card pre"))
    assert browser.run(
        "return document.querySelector('.live').hidden && document.getElementById('notice').hidden"
    )


def test_the_page_loads_nothing_from_elsewhere_and_complains_of_nothing(
    browser: Page, server: str
) -> None:
    browser.complaints()
    browser.open(f"{server}/?prompt=%3Cscript%3Ealert(1)%3C%2Fscript%3E&max_tokens=3&run=1")
    written(browser)
    loaded = browser.run(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert loaded
    assert all(name.startswith((server, "data:")) for name in loaded), loaded
    assert browser.text("#given") == "<script>alert(1)</script>"
    assert browser.complaints() == []


def test_every_control_has_a_name_and_the_page_fits_a_phone(browser: Page, server: str) -> None:
    browser.open(f"{server}/?seed=7&run=pictures")
    browser.until(lambda: len(browser.find("#grid img")) == 16)
    browser.until(lambda: not browser.run("return document.getElementById('way').hidden"))
    browser.run(OPEN_ALL)
    names = {
        browser.markup(control): browser.name(control)
        for control in browser.find("button, input, select, textarea, a")
    }
    assert [markup for markup, name in names.items() if not name] == []
    browser.resize(500, 900)  # the narrowest that Chromium's window gets
    try:
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.resize(*WINDOW)

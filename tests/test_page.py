"""The studio page in headless Chromium, with the real ingress over tiny models."""

import asyncio
import base64
import io
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal, TypeVar

import httpx
import pytest
import uvicorn
from PIL import Image
from selenium.common import (
    NoSuchElementException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.demo.browser import started
from cluster.machine import free_port
from models import registry
from serve.http.app import build_app
from serve.http.catalog import Catalog
from serve.replicas import ImageReplica, TextReplica
from tests.support import bundles
from tests.support.browser import require_browser
from tests.support.fakes import LocalModel

T = TypeVar("T")

WINDOW = (1360, 1250)
TOKEN_S = 0.03  # slow enough that a test sees the text stream, and can stop it
TIMEOUT_S = 60
POLL_INTERVAL_S = 0.02

OPEN_ALL = "for (const details of document.querySelectorAll('details')) details.open = true"
STATUS = {
    "deployments": {
        "TextReplica": {"replicas": 1, "target": 2, "status": "UPSCALING"},
        "ImageReplica": {"replicas": 1, "target": 1, "status": "HEALTHY"},
    },
    "latency_ms": {
        "text_time_to_first_token": {"p50": 12.345, "p99": 40.1},
        "image": {"p50": None, "p99": None},
    },
}
# The contrast ratio of every visible text: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio.
CONTRASTS = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const luminance = (color) => {
  const [r, g, b] = channels(color).map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const isOpaque = (color) => (channels(color)[3] ?? 1) === 1;
const background = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return isOpaque(color) || !element.parentElement ? color : background(element.parentElement);
};
const isText = (node) => node.nodeType === 3 && node.data.trim();
const texts = [...document.querySelectorAll("body *")].filter((element) =>
  element.checkVisibility() && !element.disabled && [...element.childNodes].some(isText));
return texts.map((element) => {
  const [a, b] = [getComputedStyle(element).color, background(element)].map(luminance);
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 120)];
});
"""


@pytest.fixture(scope="module")
def replica() -> TextReplica:
    return TextReplica(slots=4, threads=1, timeout_s=60)


@pytest.fixture(scope="module")
def server(replica: TextReplica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The ingress over tiny models. At port + 1 is one that serves only text, without /status."""
    folder = tmp_path_factory.mktemp("page")
    root = str(folder / "models")
    for version in (1, 2):
        bundle = bundles.tiny_gpt_bundle(folder / f"gpt-{version}")
        assert registry.publish(root, "gpt", bundle) == version
    registry.alias(root, "gpt", "staging", 2)
    registry.publish(root, "dcgan", bundles.tiny_gan_bundle(folder / "gan", num_classes=3))
    port = free_port()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        image_replica = ImageReplica(threads=1)
        await replica.reconfigure({"uri": registry.resolve(root, "gpt/1")[2]})
        await image_replica.reconfigure({"uri": registry.resolve(root, "dcgan")[2]})
        slow_down(replica.session)
        for images, status, at in (
            (LocalModel(image_replica), STATUS, port),
            (None, None, port + 1),
        ):
            app = build_app(LocalModel(replica), images, catalog=Catalog() if images else None)
            app.router.routes.insert(0, Route("/status", status_route(status)))
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


def status_route(status: dict[str, Any] | None) -> Callable[[Request], Awaitable[Response]]:
    async def respond(_: Request) -> Response:
        return Response(status_code=404) if status is None else JSONResponse(status)

    return respond


def slow_down(session: Any) -> None:
    """Make each decode step of a session take `TOKEN_S` longer."""
    decode = session.decode

    def slow_decode(*arguments: Any) -> Any:
        time.sleep(TOKEN_S)
        return decode(*arguments)

    session.decode = slow_decode


def complete(server: str, **request: Any) -> str:
    """Return the text that the API generates."""
    response = httpx.post(f"{server}/v1/completions", json=request, timeout=30)
    return str(response.json()["choices"][0]["text"])


def generate_images(server: str, route: str = "generations", **request: Any) -> list[str]:
    """Return the images that the API generates, in base64."""
    response = httpx.post(f"{server}/v1/images/{route}", json=request)
    return [image["b64_json"] for image in response.json()["data"]]


# ---- the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    require_browser()
    with started(*WINDOW) as driver:
        yield driver


def wait_until(browser: Chrome, condition: Callable[[Chrome], Literal[False] | T]) -> T:
    """Return the condition's first value that is true.

    Raises:
        AssertionError: there was none in time; with the page's notice and its console messages.
    """
    ignored = (NoSuchElementException, StaleElementReferenceException)
    wait = WebDriverWait(browser, TIMEOUT_S, POLL_INTERVAL_S, ignored)
    try:
        return wait.until(condition)
    except TimeoutException as error:
        notice = text_of(by_id(browser, "notice"))
        raise AssertionError(
            f"the page's notice is {notice!r}, its console has {console_messages(browser)}"
        ) from error


def by_id(browser: Chrome, element_id: str) -> WebElement:
    return browser.find_element(By.ID, element_id)


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser: Chrome, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def text_of(element: WebElement) -> str:
    """Return an element's text as it is in the document: `.text` would trim it."""
    return str(element.get_property("textContent"))


def base64_of(element: WebElement, attribute: str = "src") -> str:
    """Return the base64 data of a data URL."""
    return str(element.get_property(attribute)).partition(",")[2]


def wait_until_shown(browser: Chrome, element_id: str) -> WebElement:
    locator = (By.ID, element_id)
    return wait_until(browser, expected_conditions.visibility_of_element_located(locator))


def wait_for_text(browser: Chrome, selector: str) -> str:
    """Return an element's text once it has one."""
    return wait_until(browser, lambda _: text_of(find(browser, selector)) or False)


def wait_for_completion(browser: Chrome) -> str:
    """Return the completion once it has ended."""
    wait_until(browser, lambda _: text_of(by_id(browser, "finish-reason")) != "–")
    return text_of(by_id(browser, "completion"))


def wait_for_images(browser: Chrome, count: int) -> list[WebElement]:
    """Return the grid's images once there are so many."""

    def images(_: Chrome) -> list[WebElement] | Literal[False]:
        found = find_all(browser, "#image-grid img")
        return found if len(found) == count else False

    return wait_until(browser, images)


def focused_id(browser: Chrome) -> str | None:
    return browser.switch_to.active_element.get_attribute("id")


def set_slider(browser: Chrome, element_id: str, value: float) -> None:
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(script, by_id(browser, element_id), value)


def prefer_color_scheme(browser: Chrome, scheme: Literal["light", "dark", ""]) -> None:
    """Emulate a preference of the user; "" ends the emulation."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def console_messages(browser: Chrome) -> list[str]:
    """Return the console's messages since the last call: blocked by policy, not found, thrown."""
    return [entry["message"] for entry in browser.get_log("browser")]


# ---- text


def test_completion_streams_and_matches_the_api(browser: Chrome, server: str) -> None:
    browser.get(server)
    wait_until_shown(browser, "text")
    by_id(browser, "prompt").send_keys("Now is")
    by_id(browser, "text-seed").send_keys("5")
    by_id(browser, "generate-text").click()
    early = wait_for_text(browser, "#completion")
    assert by_id(browser, "text-output").get_attribute("aria-busy") == "true"
    text = wait_for_completion(browser)
    assert text.startswith(early)
    assert len(text) > len(early)
    assert text_of(by_id(browser, "output-prompt")) == "Now is"
    tokens = int(text_of(by_id(browser, "tokens")))
    assert complete(server, prompt="Now is", max_tokens=tokens, seed=5) == text
    assert text_of(by_id(browser, "used-seed")) == "5"
    tokens_per_second = int(text_of(by_id(browser, "tokens-per-second")))
    assert 0 < tokens_per_second <= 1 / TOKEN_S


def test_every_text_setting_is_sent(browser: Chrome, server: str) -> None:
    request: dict[str, Any] = {
        "prompt": "Now",
        "max_tokens": 12,
        "temperature": 1.5,
        "top_k": 20,
        "top_p": 0.6,
        "repetition_penalty": 1.4,
        "seed": 3,
    }
    browser.get(f"{server}/?{httpx.QueryParams(request)}&run=text")
    text = wait_for_completion(browser)
    assert complete(server, **request) == text
    for omitted in ("top_p", "repetition_penalty"):
        others = {name: value for name, value in request.items() if name != omitted}
        assert complete(server, **others) != text
    browser.get(f"{server}/?{httpx.QueryParams(request | {'stop': text[4:6]})}&run=text")
    assert wait_for_completion(browser) == text[: text.index(text[4:6])]
    assert text_of(by_id(browser, "finish-reason")) == "stop string or end of text"


def test_stop_button_cancels_generation(browser: Chrome, server: str, replica: TextReplica) -> None:
    browser.get(f"{server}/?prompt=Now&seed=5&run=text")
    wait_for_text(browser, "#completion")
    by_id(browser, "stop").click()
    assert text_of(by_id(browser, "finish-reason")) == "stop button"
    engine = replica.engine
    assert engine is not None
    wait_until(browser, lambda _: engine.status()["running"] == 0)
    text = text_of(by_id(browser, "completion"))
    assert len(text) > 0
    assert int(text_of(by_id(browser, "tokens"))) < 50
    assert text_of(by_id(browser, "completion")) == text
    assert not by_id(browser, "stop").is_enabled()


def test_refusal_is_shown(browser: Chrome, server: str) -> None:
    browser.get(server)
    wait_until_shown(browser, "text")
    prompt = by_id(browser, "prompt")
    browser.execute_script("arguments[0].value = 'Now is the winter. '.repeat(40)", prompt)
    by_id(browser, "generate-text").click()
    message = "exceed the model's context of 64 tokens"
    wait_until(browser, lambda _: message in text_of(by_id(browser, "notice")))


def test_prompt_of_many_tokens_is_retried_with_fewer_max_tokens(
    browser: Chrome, server: str
) -> None:
    prompt = "ж" * 20  # 40 bytes, and as many tokens
    browser.get(f"{server}/?prompt={prompt}&max_tokens=60&seed=5&run=text")
    text = wait_for_completion(browser)
    seed = int(text_of(by_id(browser, "used-seed")))
    assert complete(server, prompt=prompt, max_tokens=64 - 40, seed=seed) == text


# ---- images


def test_images_of_seed_and_class_match_the_api(browser: Chrome, server: str) -> None:
    browser.get(f"{server}/?seed=7&run=images")
    images = wait_for_images(browser, 16)
    assert [base64_of(image) for image in images] == generate_images(server, seed=7, n=16)
    label = Select(by_id(browser, "label"))
    options = [option.text for option in label.options]
    assert options == ["all in turn", "class 0", "class 1", "class 2"]
    label.select_by_visible_text("class 2")
    Select(by_id(browser, "n")).select_by_visible_text("4")
    by_id(browser, "generate-images").click()
    images = wait_for_images(browser, 4)
    assert [image.get_property("alt") for image in images] == ["class 2"] * 4
    link = find(browser, "#image-grid a")
    assert link.get_property("download") == "dcgan-1-seed7-0.png"
    download = by_id(browser, "download-all")
    wait_until(browser, lambda _: str(download.get_property("href")).startswith("data:image/png"))
    by_id(browser, "next-seed").click()
    wait_until(browser, lambda _: "seed 8" in text_of(by_id(browser, "image-status")))


def test_truncation_is_sent_unless_the_slider_is_at_its_end(browser: Chrome, server: str) -> None:
    browser.get(f"{server}/?seed=7&n=4&truncation=0.5&run=images")
    images = [base64_of(image) for image in wait_for_images(browser, 4)]
    truncated = generate_images(server, seed=7, n=4, truncation=0.5)
    untruncated = generate_images(server, seed=7, n=4)
    assert images == truncated != untruncated
    assert text_of(by_id(browser, "truncation-value")) == "0.5"
    assert "truncation=0.5" in browser.current_url
    set_slider(browser, "truncation", 3.1)
    assert text_of(by_id(browser, "truncation-value")) == "off"
    by_id(browser, "generate-images").click()
    wait_until(
        browser,
        lambda _: [base64_of(image) for image in wait_for_images(browser, 4)] == untruncated,
    )
    assert "truncation" not in browser.current_url


def test_interpolation_slider_works_by_keyboard(browser: Chrome, server: str) -> None:
    browser.get(f"{server}/?from=3&to=5&label=class%201&run=images")
    wait_until_shown(browser, "interpolation")
    expected = generate_images(server, "interpolations", seed=3, to_seed=5, steps=21, label=1)
    slider, image = by_id(browser, "position"), by_id(browser, "step-image")
    assert base64_of(image) == expected[10]
    for key, step, percent in (
        (Keys.ARROW_RIGHT, 11, "55%"),
        (Keys.END, 20, "100%"),
        (Keys.HOME, 0, "0%"),
    ):
        slider.send_keys(key)
        assert base64_of(image) == expected[step]
        description = f"{percent} of the way from seed 3 to seed 5"
        assert slider.get_attribute("aria-valuetext") == description
        assert image.get_property("alt") == f"Image at {description}"
    download = by_id(browser, "download-step")
    assert download.get_property("download") == "dcgan-1-seed3-to-5-0.png"
    assert base64_of(download, "href") == expected[0]
    strip = base64.b64decode(base64_of(by_id(browser, "download-strip"), "href"))
    assert Image.open(io.BytesIO(strip)).size == (21 * 28, 28)


# ---- models


def test_model_cards_show_replicas_latency_and_sample(browser: Chrome, server: str) -> None:
    browser.get(server)
    gpt, gan = ".card[data-kind=gpt]", ".card[data-kind=gan]"
    wait_for_text(browser, f"{gan} .status dd")
    gpt_status = [text_of(detail) for detail in find_all(browser, f"{gpt} .status dd")]
    assert gpt_status == ["1 of 2, upscaling", "12.35 ms (p50), 40.1 ms (p99)"]
    gan_status = [text_of(detail) for detail in find_all(browser, f"{gan} .status dd")]
    assert gan_status == ["1, healthy"]
    sample = wait_for_text(browser, f"{gpt} pre")
    assert sample == httpx.get(f"{server}/v1/models/gpt/sample").text
    image = wait_until(browser, lambda _: find(browser, f"{gan} figure img"))
    browser.execute_script("arguments[0].scrollIntoView()", image)
    wait_until(browser, lambda _: int(str(image.get_property("naturalWidth"))) > 28)


def test_versions_are_listed_with_their_samples(browser: Chrome, server: str) -> None:
    browser.get(server)
    summary = wait_until(browser, lambda _: find(browser, ".card[data-kind=gpt] summary"))
    summary.click()
    rows = wait_until(browser, lambda _: find_all(browser, ".versions tbody tr") or False)
    titles = [text_of(row.find_element(By.TAG_NAME, "th")).strip() for row in rows]
    assert titles == ["2 staging", "1 served"]
    find(browser, ".versions tbody button").click()
    sample = httpx.get(f"{server}/v1/models/gpt/versions/2/sample").text
    assert wait_for_text(browser, ".versions pre") == sample


def test_panel_of_a_kind_that_is_not_served_is_hidden(browser: Chrome, server: str) -> None:
    address, _, port = server.rpartition(":")
    browser.get(f"{address}:{int(port) + 1}/")
    wait_until_shown(browser, "text")
    assert by_id(browser, "images").get_property("hidden")
    wait_for_text(browser, ".card pre")
    assert find(browser, ".status").get_property("hidden")
    assert by_id(browser, "notice").get_property("hidden")


# ---- the whole page


def test_keyboard_focus_stays_on_an_enabled_button(browser: Chrome, server: str) -> None:
    browser.get(f"{server}/?prompt=Now&run=text")
    wait_for_text(browser, "#completion")
    by_id(browser, "stop").send_keys(Keys.ENTER)
    assert text_of(by_id(browser, "finish-reason")) == "stop button"
    assert focused_id(browser) == "generate-text"
    by_id(browser, "generate-images").send_keys(Keys.ENTER)
    wait_until(browser, lambda _: find(browser, "#image-grid img"))
    assert focused_id(browser) == "generate-images"
    by_id(browser, "interpolate").send_keys(Keys.ENTER)
    wait_until_shown(browser, "interpolation")
    assert focused_id(browser) == "interpolate"


def test_address_reproduces_what_is_shown(browser: Chrome, server: str) -> None:
    browser.get(f"{server}/?prompt=Now%20is%0A&max_tokens=5&temperature=1.5&run=1")
    text, address = wait_for_completion(browser), browser.current_url
    images = wait_for_text(browser, "#image-status")
    browser.get(f"{address}&run=1")
    assert wait_for_completion(browser) == text
    # "16 images of seed 7 from dcgan/1 in 40 ms": the latency differs.
    again = wait_for_text(browser, "#image-status")
    assert again.partition(" from ")[0] == images.partition(" from ")[0]


def test_page_files_are_revalidated(server: str) -> None:
    for path in ("/", "/page/main.js"):
        response = httpx.get(f"{server}{path}")
        assert response.headers["cache-control"] == "no-cache"
    headers = {"If-None-Match": response.headers["etag"]}
    again = httpx.get(f"{server}/page/main.js", headers=headers)
    assert (again.status_code, again.content) == (304, b"")


def test_page_loads_only_from_the_server_without_console_messages(
    browser: Chrome, server: str
) -> None:
    console_messages(browser)
    browser.get(f"{server}/?prompt=%3Cscript%3Ealert(1)%3C%2Fscript%3E&max_tokens=3&run=1")
    wait_for_completion(browser)
    urls = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert urls
    assert all(url.startswith((server, "data:")) for url in urls), urls
    assert text_of(by_id(browser, "output-prompt")) == "<script>alert(1)</script>"
    assert console_messages(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_meets_wcag_aa(
    browser: Chrome, server: str, scheme: Literal["light", "dark"]
) -> None:
    prefer_color_scheme(browser, scheme)
    try:
        browser.get(f"{server}/?prompt=Now&max_tokens=3&seed=7&run=1")
        wait_for_completion(browser)
        wait_until_shown(browser, "interpolation")
        browser.execute_script(OPEN_ALL)
        wait_until(browser, lambda _: find(browser, ".versions tbody button"))
        browser.execute_script(
            "arguments[0].hidden = false; arguments[0].textContent = 'Wrong'",
            by_id(browser, "notice"),
        )
        contrasts = browser.execute_script(CONTRASTS)
        assert len(contrasts) > 50
        assert [(ratio, markup) for ratio, markup in contrasts if ratio < 4.5] == []
    finally:
        prefer_color_scheme(browser, "")


def test_controls_have_names_and_the_page_fits_a_phone(browser: Chrome, server: str) -> None:
    browser.get(f"{server}/?seed=7&run=images")
    wait_for_images(browser, 16)
    wait_until_shown(browser, "interpolation")
    browser.execute_script(OPEN_ALL)
    controls = find_all(browser, "button, input, select, textarea, a")
    names = {
        str(control.get_property("outerHTML"))[:200]: control.accessible_name
        for control in controls
    }
    assert [markup for markup, name in names.items() if not name] == []
    browser.set_window_size(500, 900)  # the narrowest window that Chromium supports
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.set_window_size(*WINDOW)

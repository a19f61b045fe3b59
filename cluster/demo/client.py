"""The demo's requests to the endpoint: a text while it streams, and images of every class."""

import base64
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

PROMPT = "**HAMLET**  \nTo be, or "
MAX_TOKENS = 200
IMAGES_PER_CLASS = 8
GAP = 1  # white pixels around an image, before it is enlarged
CELL = 64  # pixels per side to which images are enlarged, by whole factors


@dataclass(frozen=True)
class Responses:
    """What the endpoint has generated, and how fast.

    Attributes:
        text: the prompt and the generated text.
        tokens_per_s: of the streamed text, as one reader sees it.
        images: how many were generated.
        images_per_s: requests one after the other, each for the images of one class.
        sheet: the images, one class per row.
    """

    text: str
    tokens_per_s: float
    images: int
    images_per_s: float
    sheet: Image.Image


def send_requests(url: str, show: Callable[[str], None]) -> Responses:
    """Send requests to both models at `url`.

    Args:
        url: of a server with a GPT and a GAN.
        show: called with each piece of the text.

    Raises:
        httpx.HTTPError: the endpoint does not answer, or responds with an error.
        ValueError: the endpoint reports an error within the stream.
    """
    # trust_env=False: a proxy from the environment must not be used for this machine.
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        listed = http.get("/v1/models").raise_for_status().json()["data"]
        models = {model["kind"]: model["model"] for model in listed}
        # A token is at least one byte, so the prompt has at most as many tokens as bytes.
        available = models["gpt"]["context"] - len(PROMPT.encode())
        begun = time.monotonic()
        text, tokens = stream_text(http, min(MAX_TOKENS, available), show)
        text_seconds = time.monotonic() - begun
        begun = time.monotonic()
        rows = generate_images(http, models["gan"]["class_names"] or [None])
        image_seconds = time.monotonic() - begun
    count = sum(len(row) for row in rows)
    return Responses(
        text=PROMPT + text,
        tokens_per_s=round(tokens / text_seconds, 1),
        images=count,
        images_per_s=round(count / image_seconds, 1),
        sheet=_sheet(rows),
    )


def stream_text(
    http: httpx.Client, max_tokens: int, show: Callable[[str], None]
) -> tuple[str, int]:
    """Generate text after `PROMPT`.

    Returns:
        The text, and its number of tokens.
    """
    body = {
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "temperature": 0.7,
        "top_k": 50,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, tokens = "", 0
    with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            message = json.loads(line.removeprefix("data: "))
            if "error" in message:
                reason = message["error"]["message"]
                raise ValueError(f"the demo failed: the endpoint ended its text early ({reason})")
            tokens = (message.get("usage") or {}).get("completion_tokens", tokens)
            for choice in message["choices"]:
                text += choice["text"]
                show(choice["text"])
    return text, tokens


def generate_images(http: httpx.Client, classes: list[str | None]) -> list[list[np.ndarray]]:
    """Generate `IMAGES_PER_CLASS` images of each class.

    Args:
        http: the client of the endpoint.
        classes: names of classes; [None] for a model without classes.

    Returns:
        A row per class of images (H, W, 3) uint8.
    """
    rows = []
    for number, label in enumerate(classes):
        body: dict[str, object] = {"n": IMAGES_PER_CLASS, "seed": 100 + number}
        if label is not None:
            body["label"] = label
        found = http.post("/v1/images/generations", json=body).raise_for_status().json()["data"]
        rows.append([_decode(item["b64_json"]) for item in found])
    return rows


def _decode(content: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def _sheet(rows: list[list[np.ndarray]]) -> Image.Image:
    """Join equally long rows of images (H, W, 3).

    `models.images.contact_sheet` does more (rows that are not full), but `cluster` must not import
    `models`, and the server's own sheets do not have one row per class.
    """
    margin = ((GAP, GAP), (GAP, GAP), (0, 0))
    padded = [[np.pad(image, margin, constant_values=255) for image in row] for row in rows]
    pixels = np.vstack([np.hstack(row) for row in padded])
    scale = max(1, CELL // rows[0][0].shape[1])
    return Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))

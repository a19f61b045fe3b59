"""Images over HTTP through Ray Serve: seeds, classes, interpolations, PNG files."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.support.served import generate


def decode_png(png: bytes) -> np.ndarray:
    """Return the pixels of a grayscale PNG file, (H, W)."""
    return np.asarray(Image.open(io.BytesIO(png)))


def images_of(answer: dict[str, Any]) -> np.ndarray:
    """Return the images of a response, (N, H, W)."""
    return np.stack([decode_png(base64.b64decode(image["b64_json"])) for image in answer["data"]])


def test_seeded_image_is_same_alone_and_in_batch(client: httpx.Client) -> None:
    many, one = generate(client, n=5, seed=7), generate(client, n=1, seed=7)
    assert many["data"][0] == one["data"][0]
    assert len({image["b64_json"] for image in many["data"]}) == 5
    assert (many["seed"], many["model"]) == (7, "dcgan/1")
    generated = client.post("/generate", json={"seed": 7}).json()
    assert generated["image_base64"] == one["data"][0]["b64_json"]
    assert generated["seed"] == 7
    image = Image.open(io.BytesIO(base64.b64decode(generated["image_base64"])))
    assert (image.format, image.size, image.mode) == ("PNG", (28, 28), "L")


def test_images_equal_golden_images(client: httpx.Client, registry_root: str) -> None:
    recorded = json.loads((Path(registry_root) / "dcgan/1/golden.json").read_text())
    for label, expected in zip(recorded["labels"], recorded["images"], strict=True):
        index = recorded["labels"].index(label)
        response = generate(client, n=index + 1, seed=recorded["seed"], label=label)
        image = images_of(response)[index]
        assert np.abs(image - (np.array(expected)[0] + 1) * 127.5).max() <= 1


def test_class_is_chosen_by_prompt_name_or_index(client: httpx.Client) -> None:
    answers = [
        generate(client, seed=3, **how)["data"]
        for how in ({"prompt": "Class 2"}, {"label": "class 2"}, {"label": 2})
    ]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0]["label"] == "class 2"


def test_requests_without_seed_differ(client: httpx.Client) -> None:
    first, second = generate(client), generate(client)
    assert first["seed"] != second["seed"]
    assert generate(client, seed=first["seed"])["data"] == first["data"]


def test_interpolation_starts_and_ends_at_seeded_images(client: httpx.Client) -> None:
    path = generate(client, "interpolations", seed=7, to_seed=8, steps=5, truncation=1.5)
    ends = [generate(client, seed=seed, label=7 % 3, truncation=1.5)["data"][0] for seed in (7, 8)]
    assert [path["data"][0], path["data"][-1]] == ends
    assert [image["label"] for image in path["data"]] == ["class 1"] * 5
    assert len({image["b64_json"] for image in path["data"]}) == 5
    labeled = generate(
        client, "interpolations", seed=7, to_seed=8, steps=5, label="Class 1", truncation=1.5
    )
    assert labeled["data"] == path["data"]


def test_truncated_image_is_same_alone_and_in_batch(client: httpx.Client) -> None:
    many, one = (generate(client, n=n, seed=7, truncation=0.5)["data"] for n in (4, 1))
    assert many[0] == one[0]
    assert one != generate(client, seed=7)["data"]


def test_png_response_is_one_sheet_of_the_images(client: httpx.Client) -> None:
    response = client.post(
        "/v1/images/generations", json={"n": 5, "seed": 7, "response_format": "png"}
    )
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert (response.headers["raykiln-seed"], response.headers["raykiln-model"]) == ("7", "dcgan/1")
    first, second, third, fourth, fifth = images_of(generate(client, n=5, seed=7))
    unused = np.full((28, 28), 255)
    np.testing.assert_array_equal(
        decode_png(response.content), np.block([[first, second, third], [fourth, fifth, unused]])
    )

    walk = {"seed": 7, "to_seed": 8, "steps": 4}
    strip = client.post("/v1/images/interpolations", json={**walk, "response_format": "png"})
    np.testing.assert_array_equal(
        decode_png(strip.content),
        np.hstack([*images_of(generate(client, "interpolations", **walk))]),
    )

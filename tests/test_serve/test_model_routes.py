"""The served models and their versions over HTTP through Ray Serve."""

from pathlib import Path

import httpx

from models import registry


def test_sample_is_from_bundle(client: httpx.Client, registry_root: str) -> None:
    for name, media_type, file in (
        ("gpt", "text/plain; charset=utf-8", "gpt/1/sample.txt"),
        ("dcgan", "image/png", "dcgan/1/sample.png"),
    ):
        response = client.get(f"/v1/models/{name}/sample")
        assert (response.status_code, response.headers["content-type"]) == (200, media_type)
        assert response.content == (Path(registry_root) / file).read_bytes()
    assert [model["sample"] for model in client.get("/v1/models").json()["data"]] == [True, True]
    unknown = client.get("/v1/models/other/sample")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_all_versions_in_registry_are_listed(client: httpx.Client, registry_root: str) -> None:
    listed = client.get("/v1/models/gpt/versions").json()["data"]
    assert (
        [model["version"] for model in listed]
        == sorted(registry.versions(registry_root, "gpt"), reverse=True)
        != [1]
    )
    sample = client.get(f"/v1/models/gpt/versions/{listed[0]['version']}/sample")
    assert (sample.headers["content-type"], sample.content) == (
        "text/plain; charset=utf-8",
        (Path(registry_root) / "gpt/2/sample.txt").read_bytes(),
    )
    for path, status, message in (
        ("gpt/versions/99/sample", 404, "no sample of gpt/99"),
        ("gpt/versions/one/sample", 422, "version is 'one': input should be a valid integer"),
        ("other/versions", 404, "model 'other' is not served here"),
    ):
        refused = client.get(f"/v1/models/{path}")
        assert refused.status_code == status
        assert message in refused.json()["error"]["message"]

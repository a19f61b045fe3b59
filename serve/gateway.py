"""The deployment that receives HTTP requests, in a process of its own."""

from fastapi import FastAPI
from ray import serve

from serve.cluster_status import ServeCluster
from serve.http import access_log
from serve.http.app import build_app
from serve.http.catalog import Catalog
from serve.remote import Handle, RemoteImageModel, RemoteTextModel


@serve.ingress()
class Gateway:
    """HTTP in front of the models, which run in other deployments."""

    def __init__(self, text: Handle | None, images: Handle | None) -> None:
        self.text = None if text is None else RemoteTextModel(text)
        self.images = None if images is None else RemoteImageModel(images)
        self.cluster = ServeCluster(
            {handle.deployment_name: handle for handle in (text, images) if handle is not None}
        )
        access_log.to_stdout()

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Ray Serve's proxy returns the request ID.
        return build_app(self.text, self.images, self.cluster, Catalog(), returns_request_id=False)

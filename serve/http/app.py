"""The ASGI application: routes, middleware and error handlers over two models. No Ray."""

from fastapi import FastAPI
from starlette.types import ASGIApp

from serve.http import exception_handlers
from serve.http.access_log import AccessLog
from serve.http.latency import Latency
from serve.http.middleware import BodyLimit
from serve.http.page_files import PAGE, PageFiles
from serve.http.protocols import Catalog, Cluster, ImageModel, TextModel
from serve.http.routes import router


class App(FastAPI):
    """FastAPI with the access log around everything.

    Middleware that is added in the usual way runs inside FastAPI's handler of unexpected
    exceptions, and would not see its responses.
    """

    def build_middleware_stack(self) -> ASGIApp:
        return AccessLog(super().build_middleware_stack(), self.state.returns_request_id)


def build_app(
    text: TextModel | None,
    images: ImageModel | None,
    cluster: Cluster | None = None,
    catalog: Catalog | None = None,
    returns_request_id: bool = True,
) -> FastAPI:
    """Build the ASGI application.

    Args:
        text, images: the models; the routes of a model that is None return 404.
        cluster: for /status; None: it lists no deployments.
        catalog: for /v1/models/NAME/versions; None: it returns 404.
        returns_request_id: see `serve.http.access_log.AccessLog`.
    """
    app = App(title="raykiln", summary="Text and images, in OpenAI's shapes.", redoc_url=None)
    app.state.text, app.state.images = text, images
    app.state.cluster, app.state.catalog = cluster, catalog
    app.state.latency = {"text_time_to_first_token": Latency(), "image": Latency()}
    app.state.returns_request_id = returns_request_id
    app.include_router(router)
    app.mount("/page", PageFiles(directory=PAGE))
    app.add_middleware(BodyLimit)
    exception_handlers.add_to(app)
    return app

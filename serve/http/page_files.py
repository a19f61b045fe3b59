"""The studio page and its files."""

from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

PAGE = Path(__file__).parent.parent / "page"
# The page loads nothing from other origins, and the text of a prompt can never become a script.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cache-Control": "no-cache",
}


def page_response() -> FileResponse:
    """Return the response to GET /."""
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


class PageFiles(StaticFiles):
    """The page's files.

    Browsers revalidate them on every load, so that a page never mixes files of two versions.
    """

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response

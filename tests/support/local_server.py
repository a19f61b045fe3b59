"""The routes over real HTTP without Ray: an application in a thread of the test process."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from fastapi import FastAPI


@contextlib.contextmanager
def running(build: Callable[[], Awaitable[FastAPI]], port: int) -> Iterator[str]:
    """Serve an application until the block ends, and yield its URL.

    Args:
        build: creates the application, on the event loop that serves it.
    """
    started: list[uvicorn.Server] = []

    async def serve() -> None:
        config = uvicorn.Config(await build(), port=port, log_level="warning")
        started.append(uvicorn.Server(config))
        await started[0].serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while not started or not started[0].started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    started[0].should_exit = True
    thread.join(20)

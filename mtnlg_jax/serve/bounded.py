"""Run Python that may not end, such as a chat template, for a bounded time."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from typing import Any


class _TooLong(BaseException):
    """Raised inside a thread whose time is over."""


async def within_seconds(function: Callable[[], Any], seconds: float) -> Any:
    """Return what ``function`` returns, run in a thread.

    Raises TimeoutError after ``seconds``; the thread then ends at its next step of Python.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def report(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def body() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = (function(), None)
        except _TooLong:
            return
        except BaseException as error:
            outcome = (None, error)
        try:
            loop.call_soon_threadsafe(report, *outcome)
        except RuntimeError:  # the loop is closed
            pass

    thread = threading.Thread(target=body, name="bounded", daemon=True)
    thread.start()
    try:
        return await asyncio.wait_for(future, seconds)
    except TimeoutError:
        interrupt(thread)
        raise


def interrupt(thread: threading.Thread) -> None:
    """Raise an exception inside a thread, at its next step of Python."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(_TooLong)
        )

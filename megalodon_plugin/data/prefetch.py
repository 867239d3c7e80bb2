"""Prepares what comes next in a thread, while what came before is used."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Runs one call at a time in a thread; its result, or exception, comes out of `result`."""

    def __enter__(self) -> "Prefetch[T]":
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="text-loader")
        # Bound here: an iterator alive at the interpreter's end is closed when modules, this one too, are empty.
        self._is_finalizing = sys.is_finalizing
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_finalizing():
            self._executor.shutdown(wait=False, cancel_futures=True)

    def start(self, call: Callable[[], T]) -> None:
        self._future = self._executor.submit(call)

    def result(self) -> T:
        return self._future.result()

    def discard(self) -> None:
        """Drop what was started; the thread takes the next call once it is done with this one."""
        self._future.cancel()

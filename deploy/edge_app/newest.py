"""The newest of what a live source gives: it does not wait for whoever looks at it, and nothing queues."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_CLOSING_S = 2.0


class Newest(Generic[T]):
    """Reads a generator in a thread of its own and gives the newest item of each type, in their order.

    What nobody took in time is dropped; one type does not displace another, such as news of the source a frame.

    Attributes:
        dropped: how many items of each type were.

    Args:
        items: what is read; its errors are raised where the items are taken.
        stop: tells the generator that it is to end.
    """

    def __init__(self, items: Generator[T, None, None] | Iterator[T], stop: threading.Event) -> None:
        self.dropped: Counter[type] = Counter()
        self._stop = stop
        self._slots: dict[type, T] = {}
        self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        # A daemon: a driver that hangs in a read must not keep the process alive.
        self._thread = threading.Thread(target=self._read, args=(items,), name="newest frame", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._slots or self._ended)
                if not self._slots:
                    break
                item = self._slots.pop(next(iter(self._slots)))
            yield item
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread; one that hangs in a driver is left behind after two seconds."""
        self._stop.set()
        self._thread.join(_CLOSING_S)

    def _read(self, items: Generator[T, None, None] | Iterator[T]) -> None:
        error: BaseException | None = None
        try:
            for item in items:
                with self._changed:
                    self.dropped[type(item)] += self._slots.pop(type(item), None) is not None
                    self._slots[type(item)] = item  # behind the others
                    self._changed.notify()
                if self._stop.is_set():
                    break
            if isinstance(items, Generator):
                items.close()  # here: it may hold a device
        except BaseException as raised:
            error = raised
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify()

"""Why a login was refused, and when it is tried again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

from zinf_cli.errors import HostError

T = TypeVar("T")

_WAITS_S = (0.2, 0.4, 0.8, 1.6, 3.2, 3.2)
"""Before another try, where a server takes no more logins at a time (MaxStartups). Times 0.5 to 1.5, by chance."""


class Refusal(HostError):  # noqa: N818 (an event that has a cause)
    """Why SSH did not come through. `busy`: the server takes no more logins at this moment."""

    def __init__(self, message: str, hint: str | None = None, *, busy: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.busy = busy

    def of_hop(self, hop: object) -> Refusal:
        """The same, of a jump host on the way."""
        return Refusal(f"its jump host {hop}: {self.message}", self.hint, busy=self.busy)


def patiently(attempt: Callable[[], T]) -> T:
    """Do it, again and again while the server is busy. Else Refusal says why not."""
    for wait in _WAITS_S:
        try:
            return attempt()
        except Refusal as error:
            if not error.busy:
                raise
        time.sleep(wait * random.uniform(0.5, 1.5))
    return attempt()


class Shared(Generic[T]):
    """Things that are made when they are first asked for, and shared from then on, until one is over.

    Who asks while one is being made gets the same: the thing, or the error.
    """

    def __init__(self, is_over: Callable[[T], bool]) -> None:
        self._is_over = is_over
        self._made: dict[Hashable, Future[T]] = {}
        self._choosing = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The thing of this key. Threads may ask at once."""
        with self._choosing:
            found = self._made.get(key)
            if found is not None and not (found.done() and (found.exception() or self._is_over(found.result()))):
                mine = None
            else:
                mine = found = self._made[key] = Future()
        if mine is not None:
            try:
                mine.set_result(make())
            except BaseException as error:
                mine.set_exception(error)
        return found.result()

    def take_all(self) -> list[T]:
        """What there is. Nothing is shared any more."""
        made, self._made = self._made, {}
        return [one.result() for one in made.values() if one.done() and one.exception() is None]

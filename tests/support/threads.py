"""Several things done at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def at_once(tasks: Sequence[Callable[[], object]]) -> list[object]:
    """What each gives, or the exception that it raises, in a thread of its own; all begin together."""
    found: list[object] = [None] * len(tasks)
    begin = threading.Barrier(len(tasks))

    def run(index: int) -> None:
        begin.wait(20)
        try:
            found[index] = tasks[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found

"""Requests that wait: bounded, fair between keys, first come first served within a key."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping


class FairQueue[T]:
    """Items that wait under keys.

    The next one is of the key that has the fewest running; of equal keys, of the one that was
    served longest ago. So neither many requests nor long ones of a key keep the others waiting.

    ``weigh`` gives the weight of an item; ``weight`` is that of all.
    """

    def __init__(self, weigh: Callable[[T], int] = lambda item: 0):
        # In the order in which the keys were served last.
        self._queues: dict[str, deque[T]] = {}
        self._weigh = weigh
        self.weight = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[T]:
        for queue in self._queues.values():
            yield from queue

    def push(self, key: str, item: T) -> None:
        """Add an item behind those of its key."""
        self._queues.setdefault(key, deque()).append(item)
        self.weight += self._weigh(item)

    def pop(self, running: Mapping[str, int]) -> T | None:
        """Remove and return the next item, or None. ``running``: how many run of each key."""
        if not self._queues:
            return None
        # min takes the first of equals, which was served longest ago.
        key = min(self._queues, key=lambda key: running.get(key, 0))
        queue = self._queues.pop(key)
        item = queue.popleft()
        self.weight -= self._weigh(item)
        if queue:
            self._queues[key] = queue
        return item

    def take(self, wanted: Callable[[T], bool]) -> list[T]:
        """Remove and return all items that are ``wanted``."""
        found = [item for item in self if wanted(item)]
        if not found:
            return found
        self.weight -= sum(map(self._weigh, found))
        for key, queue in list(self._queues.items()):
            left = deque(item for item in queue if not wanted(item))
            if left:
                self._queues[key] = left
            else:
                del self._queues[key]
        return found

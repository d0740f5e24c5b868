"""Work that is done ahead of its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def prefetch(make: Callable[..., T], given: Iterable[tuple[Any, ...]], threads: int) -> Iterator[T]:
    """What `make` makes of each of `given`, its arguments, in order, made ahead by that many threads.

    `given` may be endless. What `make` raises is raised in its turn. Closing the iterator ends the threads.
    """
    pool = ThreadPoolExecutor(threads, "prefetch", initializer=torch.set_num_threads, initargs=(1,))
    try:
        remaining = iter(given)
        ahead: deque[Future[T]] = deque(pool.submit(make, *some) for some in islice(remaining, 2 * threads))
        while ahead:
            made = ahead.popleft().result()
            ahead.extend(pool.submit(make, *some) for some in islice(remaining, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)

"""Results computed ahead of their use, by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar, TypeVarTuple

import torch

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


def prefetch(function: Callable[[*Arguments], T], calls: Iterable[tuple[*Arguments]], threads: int) -> Generator[T]:
    """Yield the result of the function for each tuple of arguments, in order, computed ahead by that many threads.

    `calls` may be endless. An exception is raised when its result is due. Closing the iterator ends the threads.
    """
    pool = ThreadPoolExecutor(threads, "prefetch", initializer=torch.set_num_threads, initargs=(1,))
    try:
        remaining = iter(calls)
        ahead: deque[Future[T]] = deque(pool.submit(function, *call) for call in islice(remaining, 2 * threads))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(function, *call) for call in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)

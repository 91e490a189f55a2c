"""Work on a sequence by several threads, its results in order."""

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor


def ordered[T, R](
    work: Callable[[T], R], tasks: Iterable[T], *, threads: int, ahead: int
) -> Generator[R]:
    """`work(task)` of each task, in the order of the tasks.

    An exception is raised in its task's turn. When the iterator ends or is closed (use
    `contextlib.closing`, so that an exception of the consumer closes it at once), no task is
    begun any more, and all threads have ended.

    Args:
      work: called in one of the threads.
      tasks: taken in the caller's thread, as they are needed.
      threads: how many.
      ahead: how many tasks are begun at most whose results have not been taken.
    """
    waiting: collections.deque[Future[R]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="jaxquant") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(work, task))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

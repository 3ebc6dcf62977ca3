"""Work that several processes share."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def map_in_processes(function: Callable[[Any], Any], items: Iterable, num_processes: int) -> Iterator:
    """
    Results of a function for items, in their order, from so many processes, or from this one if that is 1.

    The processes are new ones, not copies of this one: a copy of a process in which torch has threads can hang. So a
    script that calls this must do so below `if __name__ == "__main__":`.

    Args:
        function: that pickle can name: of a module, or a method of an object that can be pickled.
        items: that can be pickled.
        num_processes: how many.

    Raises:
        ValueError: for less than one.
        RuntimeError: if a process ends early, for want of memory or of that line in a script.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes} is not allowed: give 1 or more")
    if num_processes == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"one of the {num_processes} processes ended early: memory may be too little for so many, or the "
                'script that starts them does so outside of `if __name__ == "__main__":`; num_processes=1 needs none'
            ) from error

"""Warnings as single lines."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Give a list that has, when the block ends, what it warned its user of, each in a line and once."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield messages
    for warning in caught:
        message = " ".join(str(warning.message).split())
        if warning.category is UserWarning and message not in messages:  # not its children, which are for programmers
            messages.append(message)

"""Runs a function on N real processes and brings the failing rank's traceback to pytest.

    def adds(world, number):
        return world.sum([number])

    assert workers.run(2, adds, 1.5) == [[3.0], [3.0]]

The function must sit at the top of its module; it gets this rank's `World` first; each rank's
result comes back in rank order. Processes are kept per world size for the whole session, so only
the first test of a size pays for starting them. After an error, a crash or a hang the processes of
that size are killed (ranks may wait for one another) and the next test gets new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from framework.cluster.crew import Crew, CrewError

WorkerError = CrewError
_crews: dict[int, Crew] = {}


def run(
    size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60, **kwargs: Any
) -> list[Any]:
    """`function(world, *args, **kwargs)` on `size` processes, in rank order. Raises WorkerError."""
    if size not in _crews:
        _crews[size] = Crew(size, preload=["framework.config.measured"])
    try:
        return _crews[size].run(function, *args, timeout_s=timeout_s, **kwargs)
    except WorkerError:
        _crews.pop(size).kill()
        raise


def stop() -> None:
    """Ends all processes. Called once, at the end of the session."""
    while _crews:
        _crews.popitem()[1].kill()

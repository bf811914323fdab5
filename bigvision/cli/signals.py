"""How a command ends when it is told to: cleaned up, with the status that shells and schedulers expect."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, told to work as Ctrl-C is: what cleans up after one does after the other."""


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Within this block SIGTERM raises Terminated; both end the process by status: 130 for Ctrl-C, 143 for
    SIGTERM, as a shell has them of a process that the signal killed. A second SIGTERM changes nothing."""
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(143 if terminated else 130)
    except SystemExit as end:  # typer knows one status for every KeyboardInterrupt
        raise SystemExit(143) if terminated and end.code == 130 else end from None

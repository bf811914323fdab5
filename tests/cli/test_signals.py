"""SIGTERM cleans up as Ctrl-C does; each ends a command by the status that a shell expects."""

import os
import signal
from collections.abc import Iterator

import pytest
import typer

from bigvision.cli.signals import Terminated, told_to_stop


@pytest.fixture(autouse=True)
def _handlers_as_they_were() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("through_typer", [True, False])
def test_a_signal_ends_a_command_cleaned_up(sign: signal.Signals, status: int, through_typer: bool) -> None:
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), sign)
            signal.pause()
        except KeyboardInterrupt as stop:
            cleaned.append(isinstance(stop, Terminated))
            raise

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(work)
    with pytest.raises(SystemExit) as end, told_to_stop():
        app([]) if through_typer else work()
    assert end.value.code == status
    assert cleaned == [sign is signal.SIGTERM]


@pytest.mark.parametrize("status", [0, 1, 130])
def test_other_ends_keep_their_status(status: int) -> None:
    with pytest.raises(SystemExit) as end, told_to_stop():
        raise SystemExit(status)
    assert end.value.code == status

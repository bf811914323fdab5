"""One process at a time, and no more than a warning where the file system knows no locks."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from tiling.lock import locked


def test_a_second_holder_is_refused_and_the_file_goes(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock, "taken"):
        with pytest.raises(ValueError, match=r"^taken$"), locked(lock, "taken"):
            pass
        assert lock.is_file()
    assert not lock.exists()
    with locked(lock, "taken"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from tiling.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), ''): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=False)
    assert (tmp_path / "lock").is_file()
    with locked(tmp_path / "lock", "taken"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_worked_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.warns(UserWarning, match="the file system has no locks"),
        locked(tmp_path / "lock", "taken"),
        locked(tmp_path / "lock", "taken"),
    ):
        pass


def test_a_lock_file_removed_while_it_is_opened_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder ends, and a third process makes and holds another, before the second asks for the lock."""
    lock, third = tmp_path / "lock", list[IO[bytes]]()
    original = fcntl.flock

    def flock(file: IO[bytes], how: int) -> None:
        if not third:
            lock.unlink()
            third.append(lock.open("ab"))
            original(third[0], how)
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=r"^taken$"), locked(lock, "taken"):
        pass
    third[0].close()

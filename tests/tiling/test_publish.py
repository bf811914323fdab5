"""What appears under a name while something is made for it is not replaced unasked."""

from pathlib import Path

import pytest

from tiling import RasterError
from tiling.publish import publish


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("taken", ["file", "folder", "dangling link"])
def test_what_appeared_meanwhile_stays(tmp_path: Path, folder: bool, taken: str, monkeypatch) -> None:
    staging, path = tmp_path / "staging", tmp_path / "result"
    staging.mkdir() if folder else staging.write_text("new")
    if taken == "file":
        path.write_text("old")
    elif taken == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(RasterError, match="result: appeared while it was being made, and stays"):
        publish(staging, path, replace=False)
    assert staging.exists()
    assert path.is_symlink() or path.is_dir() or path.read_text() == "old"


@pytest.mark.parametrize("links", [True, False])
def test_a_free_name_is_taken(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:  # as on some network file systems

        def refuse(*names: object, **more: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr("os.link", refuse)
    (tmp_path / "staging").write_text("new")
    publish(tmp_path / "staging", tmp_path / "result", replace=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "new"

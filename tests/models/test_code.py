"""A network's code is known by its sources and packages, wherever they lie."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigvision.models import code
from bigvision.models.code import code_identity
from bigvision.models.spec import load_model

FACTORY = """
from torch import nn
{imports}
class Net(nn.Conv2d):
    pass
def factory():
    {within}
    return Net(3, 2, 1)
"""


@pytest.fixture(autouse=True)
def on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def asked(folder: Path, spec: str) -> dict[str, dict[str, str]]:
    """As a process of its own would answer."""
    found = code_identity(spec, load_model(spec))
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    importlib.invalidate_caches()
    code._distribution.cache_clear()
    return found


def package(folder: Path, version: str, *, record: str | None) -> None:
    """A package `shop` of two modules as pip installs it."""
    (folder / "shop").mkdir(exist_ok=True)
    (folder / "shop" / "__init__.py").write_text("from shop.net import factory\n")
    (folder / "shop" / "net.py").write_text(FACTORY.format(imports="from shop import tools", within="pass"))
    (folder / "shop" / "tools.py").write_text("GAIN = 1\n")
    about = folder / "shop-1.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: shop\nVersion: {version}\n")
    if record is not None:
        (about / "RECORD").write_text(record)


def edit(name: str, text: str = "\nGAIN = 3\n") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "the file": edit("model.py"),
    "what it imports": edit("helper.py"),
    "what that imports": edit("deep/inner.py"),
    "a package's own module": edit("deep/__init__.py"),
    "what a function imports": edit("late.py"),
    "what is imported by name": edit("deep/constants.py"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sources_of_ones_own_are_followed(tmp_path: Path, change: str) -> None:
    (tmp_path / "deep").mkdir()
    imports = "import helper\nfrom deep.constants import GAIN"
    (tmp_path / "model.py").write_text(FACTORY.format(imports=imports, within="import late"))
    (tmp_path / "helper.py").write_text("from deep import inner\n")
    for name in ("deep/__init__.py", "late.py", "deep/constants.py"):
        (tmp_path / name).write_text("GAIN = 2\n")
    (tmp_path / "deep" / "inner.py").write_text("from . import constants\n")
    before = asked(tmp_path, f"{tmp_path}/model.py:factory")
    assert asked(tmp_path, f"{tmp_path}/model.py:factory") == before
    CHANGES[change](tmp_path)
    assert asked(tmp_path, f"{tmp_path}/model.py:factory") != before


@pytest.mark.parametrize("spec", ["shop:factory", "shop.net:factory"])
@pytest.mark.parametrize(
    ("version", "record", "edited"),
    [("2", "shop/net.py,,\n", ""), ("1", "shop/net.py,sha256=x,9\n", ""), ("1", "shop/net.py,,\n", "net.py")],
    ids=["another version", "another build", "edited in place"],
)
def test_packages_count_by_version(tmp_path: Path, spec: str, version: str, record: str, edited: str) -> None:
    package(tmp_path, "1", record="shop/net.py,,\n")
    before = asked(tmp_path, spec)
    assert "shop" in before["packages"] and "shop.tools" not in before["sources"]
    package(tmp_path, version, record=record)
    if edited:
        edit(f"shop/{edited}")(tmp_path)
    assert asked(tmp_path, spec) != before


def test_a_package_that_was_not_installed_is_ones_own(tmp_path: Path) -> None:
    package(tmp_path, "1", record=None)
    before = asked(tmp_path, "shop:factory")
    edit("shop/tools.py")(tmp_path)
    assert asked(tmp_path, "shop:factory") != before


def test_an_edit_under_a_living_process_is_refused(tmp_path: Path) -> None:
    """It would compute with the old code and note the new."""
    (tmp_path / "living_helper.py").write_text("GAIN = 1\n")
    (tmp_path / "model.py").write_text(FACTORY.format(imports="import living_helper", within="pass"))
    spec = f"{tmp_path}/model.py:factory"
    code_identity(spec, load_model(spec))
    edit("living_helper.py")(tmp_path)
    with pytest.raises(ValueError, match=r"living_helper\.py: changed since this process imported it"):
        code_identity(spec, load_model(spec))

"""What importing a package may pull in."""

import subprocess
import sys


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_importing_tiling_does_not_import_torch() -> None:
    assert "torch" not in modules_after("import tiling")


def test_importing_bigvision_imports_no_job() -> None:
    assert not any(name.startswith("bigvision.jobs") for name in modules_after("import bigvision"))

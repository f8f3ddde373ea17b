"""Is what ``make dist`` made whole? ``python tests/distribution.py DIST``: the archives there, and a build without a
compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNEL = "neuron_fp8_loader/codes/_kernel.abi3.so"
NAME = r"neuron_fp8_loader-[\w.]+-"


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def check_sdist(path: Path) -> None:
    """Every file of the repository is in it."""
    with tarfile.open(path) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        missing = set(done.stdout.split("\n")) - there - {".gitignore", ""}
        assert not missing, f"{path}: leaves out {sorted(missing)}"
    assert not [name for name in there if name.endswith((".so", ".pyc"))], path


def check_contents(wheel: Path) -> None:
    """The package as it is in the repository, without C, and nothing else."""
    inside = [name for name in names(wheel) if ".dist-info/" not in name]
    wanted = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "neuron_fp8_loader").rglob("*.*")
        if file.suffix in (".py", ".pyi", ".typed")
    }
    assert wanted == set(inside) - {KERNEL}, f"{wheel}: {sorted(wanted ^ (set(inside) - {KERNEL}))}"


def check_wheel(wheel: Path) -> None:
    """A manylinux wheel for every Python, with its kernel, stripped."""
    assert re.fullmatch(NAME + r"cp310-abi3-(manylinux\w+[.]?)+\.whl", wheel.name), wheel.name
    check_contents(wheel)
    with zipfile.ZipFile(wheel) as archive:
        kernel = archive.read(KERNEL)
    for section in (b".debug_info", b".symtab"):
        assert section not in kernel, f"{wheel}: the kernel is not stripped"


def check_without_compiler(sdist: Path) -> None:
    """No compiler, no kernel, and a name that says so."""
    with tempfile.TemporaryDirectory() as directory:
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, str(sdist)]
        subprocess.run(build, env={**os.environ, "CC": "false"}, check=True)
        (wheel,) = Path(directory).glob("*.whl")
        assert re.fullmatch(NAME + r"py3-none-any\.whl", wheel.name), wheel.name
        assert KERNEL not in names(wheel), wheel.name
        check_contents(wheel)


def main(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    wheels = sorted(dist.glob("*.whl"))
    assert wheels, f"{dist}: no wheel"
    check_sdist(sdist)
    for wheel in wheels:
        check_wheel(wheel)
    check_without_compiler(sdist)
    print("\n".join(f"{path.name}: whole" for path in (sdist, *wheels)))
    print("without a compiler: py3-none-any, no kernel")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

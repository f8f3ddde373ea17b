"""A host that gives little: memory, threads, and a stderr that is not there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import TINY, codes, save

from neuron_fp8_loader import load_state_dict
from neuron_fp8_loader.cli import main
from neuron_fp8_loader.errors import HostMemoryError
from neuron_fp8_loader.host.memory import needing
from neuron_fp8_loader.host.parallel import progress
from tests.cli.helpers import runner

MIB = 1 << 20


def child(program: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    defaults = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run(command, **{**defaults, **options})  # type: ignore[call-overload,no-any-return]


# -- memory -----------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys, torch, neuron_fp8_loader as n
tensors = n.load_state_dict(sys.argv[1], threads=1) if sys.argv[2] == "rescale" else None
size = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (48 << 20),) * 2)
try:
    if tensors is None:
        n.load_state_dict(sys.argv[1])
    else:
        n.rescale_state_dict(tensors, always=True)
except n.Fp8LoaderError as error:
    print(type(error).__name__, isinstance(error, MemoryError), error)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MiB in one file."""
    file = tmp_path_factory.mktemp("large") / "model.safetensors"
    weights = {f"{n}.weight": torch.full((4096, 4096), 0x7E, dtype=torch.uint8) for n in range(6)}
    tensors = {name: codes.view(torch.float8_e4m3fn) for name, codes in weights.items()}
    return save(file, tensors | {f"{n}.weight_scale": torch.ones(1) for n in range(6)})


@pytest.mark.parametrize(("way", "said"), [("load", "101 MB"), ("rescale", "101 MB")])
def test_less_memory_than_the_tensors_need(large: Path, way: str, said: str) -> None:
    # malloc keeps arenas in reserve, a part of the process already, in which it would find the memory after all
    done = child(LIMITED, large, way, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("HostMemoryError True ")
    assert said in line
    assert "ulimit -v" in line
    assert done.stderr == ""
    if way == "load":
        assert str(large) in line


def test_the_command_line_says_it_in_one_line(large: Path, tmp_path: Path) -> None:
    program = LIMITED.split("try:")[0] + (
        "sys.argv[1:] = ['export', sys.argv[1], sys.argv[3]]\nimport neuron_fp8_loader.tools.export\n"
        "from neuron_fp8_loader.load import parts\nparts.batches.__defaults__ = (1 << 30,)\n"
        "from neuron_fp8_loader.cli import main\nmain()"
    )
    done = child(program, large, "load", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "not enough memory: 101 MB needed" in done.stderr


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="memory location"), needing(1, "x"):
        raise RuntimeError("elements refer to a single memory location")
    with pytest.raises(HostMemoryError, match=r"x: not enough memory: 2 kB needed"), needing(2000, "x"):
        raise MemoryError


def test_threads_that_the_system_does_not_give(large: Path) -> None:
    """RLIMIT_NPROC binds nobody who is root, so the limit is one on stacks: 1 TB each, which no thread gets."""
    program = """
import sys, threading, torch, neuron_fp8_loader as n
threading.stack_size(1 << 40)
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    print(error)
print(len(n.load_state_dict(sys.argv[1], threads=8)))
"""
    done = child(program, large)
    assert done.stdout.splitlines() == ["can't start new thread", "12"], done.stderr


# -- stderr -----------------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self) -> bool:
        return True


class Ascii(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "broken": Broken,
    "no stream at all": object,
    "ascii": lambda: Ascii(io.BytesIO(), encoding="ascii"),
    "latin-1": lambda: Ascii(io.BytesIO(), encoding="latin-1"),
}


@pytest.mark.parametrize("show", [None, True])
@pytest.mark.parametrize("kind", list(STREAMS))
def test_a_load_does_not_need_stderr(monkeypatch: pytest.MonkeyPatch, kind: str, show: bool | None) -> None:
    monkeypatch.setattr(sys, "stderr", STREAMS[kind]())
    monkeypatch.setattr("neuron_fp8_loader.host.parallel._SHOW_AFTER", 0)
    assert len(load_state_dict(TINY, progress=show)) > 10
    with progress("reading", 100, show) as advance:
        for _ in range(100):
            advance(1)


def test_the_bar_comes_by_the_clock_and_tells_the_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only once something has been read: a slow disk may take long over its first piece."""

    class Terminal(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.drawn = threading.Event()

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if "0/100" in text:
                self.drawn.set()
            return super().write(text)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("neuron_fp8_loader.host.parallel._SHOW_AFTER", 0.01)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("reading", 100, None) as advance:
        assert terminal.drawn.wait(60)
        assert "-:--:--" in terminal.getvalue()
        advance(100)
    monkeypatch.setattr("neuron_fp8_loader.host.parallel._SHOW_AFTER", 60)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("reading", 100, None) as advance:
        advance(100)
    assert terminal.getvalue() == ""  # what is done in time needs none


def test_an_export_without_stderr_writes_nothing_else_into_its_files(tmp_path: Path) -> None:
    """With descriptor 2 free, the next file opened would get it, and the warnings of C libraries with it."""
    program = (
        "import os, sys; from neuron_fp8_loader.tools import shards; from neuron_fp8_loader.cli import main\n"
        "buffer = shards.buffer; shards.buffer = lambda flat: (os.write(2, b'a warning'), buffer(flat))[1]\n"
        "main(prog_name='neuron-fp8')"
    )
    (tmp_path / "run.py").write_text(program)
    shell = f'exec "{sys.executable}" {tmp_path / "run.py"} export "{TINY}" "{tmp_path / "out"}" >&- 2>&- <&-'
    assert subprocess.run(["sh", "-c", shell], timeout=60, check=False).returncode == 0
    want = load_state_dict(TINY)
    got = load_state_dict(tmp_path / "out")
    assert all(torch.equal(got[n].view(torch.uint8), t.view(torch.uint8)) for n, t in want.items())


@pytest.mark.parametrize("arguments", [["inspect"], ["verify"], ["config"], ["inspect", "--headers-only"]])
def test_names_that_the_terminal_cannot_show(tmp_path: Path, arguments: list[str]) -> None:
    name = "模型.层\N{BULLET}é"
    path = tmp_path / "é层" / "model.safetensors"
    path.parent.mkdir()
    for scale in {f"{name}.weight_scale": torch.ones(1)}, {}:  # without a scale: refused
        save(path, {f"{name}.weight": codes([[0x7E, 1]]), **scale})
        done = runner(charset="latin-1").invoke(main, [*arguments, str(path)])
        assert done.exit_code in (0, 1), done.exception
        assert b"\\u5c42" in done.stdout_bytes + done.stderr_bytes

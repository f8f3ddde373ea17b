"""Running a contender in a fresh process: its time, its peak memory, and whether its answer is right."""

from __future__ import annotations

import multiprocessing as mp
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from .common import WrongAnswer
from .contenders import CONTENDERS, Job, wrong

_PATIENCE = 1800.0  # seconds; a README script on a large checkpoint takes long


@dataclass(frozen=True)
class Run:
    """One load.

    Attributes:
        seconds: wall clock time of the load alone; starting Python and importing torch are not in it.
        cpu: CPU seconds of all its threads meanwhile, the system's included: other programs disturb them less.
        peak: bytes by which the resident set grew at its peak. Pages of a mapped file count here although the
            system may take them back at any time.
        peak_anonymous: the same without mapped files: memory that cannot be taken back. None where the system does
            not tell; sampled every 5 ms.
        written: bytes written to disk.
    """

    seconds: float
    cpu: float
    peak: int
    peak_anonymous: int | None
    written: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_apart(name: str, job: Job) -> Run:
    """Run the contender ``name`` in a process of its own.

    The process is forked from a server that has imported torch but has loaded nothing: a load pays for its page
    faults as it does in a program that has just started.

    Raises:
        WrongAnswer: it loads something else than it should, or fails.
    """
    # the answer comes as soon as the load is done; the check follows in the same process
    parent, child = _context().Pipe()
    process = _context().Process(target=_child, args=(child, name, job), daemon=True)
    process.start()
    child.close()
    try:
        before = parent.recv()
        anonymous = _sample(process.pid, parent)
        seconds, cpu, peak, written = parent.recv()
        if not parent.poll(_PATIENCE):
            raise WrongAnswer(f"{name}: no answer after {_PATIENCE:.0f} s")
        bad = parent.recv()
    except EOFError as error:
        process.join()
        raise WrongAnswer(f"{name} failed (exit code {process.exitcode}); its message is above") from error
    finally:
        parent.close()
        process.join(5)
        if process.is_alive():
            process.kill()
        if job.output is not None:
            shutil.rmtree(job.output, ignore_errors=True)
    if bad:
        raise WrongAnswer(f"{name}: {len(bad)} tensors are not what they should be: {', '.join(bad[:3])}")
    grown = None if anonymous is None or before[1] is None else max(0, anonymous - before[1])
    return Run(seconds, cpu, max(0, peak - before[0]), grown, written)


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.contenders"])
    return context


def _child(pipe: Connection, name: str, job: Job) -> None:
    contender = CONTENDERS[name]
    rss, anonymous = _status("self")
    pipe.send((_peak() if rss is None else rss, anonymous))
    begin, used = time.perf_counter(), time.process_time()
    result = contender.run(job)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - used
    written = sum(f.stat().st_size for f in job.output.iterdir()) if job.output and job.output.is_dir() else 0
    pipe.send((seconds, cpu, _peak(), written))
    pipe.send(wrong(job.made, contender.gives, result))
    pipe.close()


def _sample(pid: int | None, pipe: Connection) -> int | None:
    """The largest anonymous resident memory of a process until it sends something."""
    largest: int | None = None
    end = time.monotonic() + _PATIENCE
    while not pipe.poll(0.005):
        _, anonymous = _status(str(pid))
        if anonymous is not None:
            largest = max(largest or 0, anonymous)
        if time.monotonic() > end:
            return largest
    # once more: a quick load may have come and gone between two samples; its result is still there
    _, anonymous = _status(str(pid))
    return largest if anonymous is None else max(largest or 0, anonymous)


def _status(pid: str) -> tuple[int | None, int | None]:
    """(resident bytes, anonymous resident bytes) of a process; None where there is no /proc."""
    found: dict[str, int] = {}
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key in ("VmRSS", "RssAnon"):
                    found[key] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return found.get("VmRSS"), found.get("RssAnon")


def _peak() -> int:
    """The largest resident set of this process so far, bytes (VmHWM on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""What loads take and leave behind, measured in fresh processes: peak, slope, descriptors, threads.

A load's peak was its tensors and under 1 MiB more when this was written, a rescale in place 0.2 MiB, a scan 4 MiB,
growth 0.03 MiB: the bounds leave room for another allocator, and fail where the part that matters doubles.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import codes, random_codes, save

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")

# peak: bytes above what the process had before the load, so what imports take does not count
PROGRAM = """
import ctypes, gc, json, os, sys, threading
import neuron_fp8_loader as n

def status(field):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(field + ":"))

def peak(action):
    n.load_state_dict(small)  # all that is imported or set up once
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what was freed and is still held would be taken again unseen
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")  # the peak from now on
    kept = action()
    return status("VmHWM") - before

os.environ["NEURON_FP8_LOADER_THREADS"] = "4"  # each takes a piece
small, large, many = sys.argv[1:4]
"""


def measured(program: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if "clear_refs" in done.stderr:
        pytest.skip("the kernel does not reset peaks here")
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A small file; one of 96 MiB; a directory of 100 tiny ones with different headers."""
    directory = tmp_path_factory.mktemp("memory")
    small = save(directory / "small.safetensors", {"m.weight": codes([[0x7E]]), "m.weight_scale": torch.ones(1)})
    weight = random_codes((1024, 4096), 1)
    tensors = {f"{i}.weight": weight.clone() for i in range(24)}
    large = save(
        directory / "large.safetensors", tensors | {f"{i}.weight_scale": torch.ones(1024, 1) for i in range(24)}
    )
    many = directory / "many"
    many.mkdir()
    for i in range(100):
        pair = {f"m{i}.weight": random_codes((64, 64), i), f"m{i}.weight_scale": torch.ones(64, 1)}
        save(many / f"{i}.safetensors", pair)
    return small, large, many


def test_peaks(places: tuple[Path, Path, Path]) -> None:
    found = measured(
        """
tensors = n.load_state_dict(large)
size = sum(t.numel() * t.element_size() for t in tensors.values())
in_place = peak(lambda: n.rescale_state_dict(tensors, inplace=True, always=True))
copied = peak(lambda: n.rescale_state_dict(tensors, always=True))
del tensors
print(json.dumps({
    "size": size, "in place": in_place, "copied": copied,
    "loaded": peak(lambda: n.load_state_dict(large)),
    "to rows": peak(lambda: n.load_state_dict(large, layout="per_channel")),
    "scanned": peak(lambda: __import__("neuron_fp8_loader.tools.scan").tools.scan.scan_checkpoint(large)),
}))
""",
        *places,
    )
    size = found.pop("size")
    assert size > 96 * MIB
    # a load takes its tensors' memory once and a few pieces more; in place, and to look, it takes pieces only
    assert 0.9 * size < found["loaded"] < 1.25 * size, found
    assert 0.9 * size < found["to rows"] < 1.25 * size, found
    assert found["copied"] < 1.25 * size, found
    assert found["in place"] < 3 * MIB, found  # a weight is 4 MiB
    assert found["scanned"] < 10 * MIB, found


def test_many_loads_leave_nothing_behind(places: tuple[Path, Path, Path]) -> None:
    found = measured(
        """
files = [os.path.join(many, name) for name in sorted(os.listdir(many))]

def round():
    for number, file in enumerate(files):
        if number % 2:
            n.load_state_dict(file)
        else:
            n.rescale_state_dict(n.load_file(file), always=True)
            with n.safe_open(file) as opened:
                opened.get_tensors()
    gc.collect()
    return status("VmRSS"), len(os.listdir("/proc/self/fd")), threading.active_count(), status("Threads") >> 10

first = round()
rounds = [round() for _ in range(4)]
print(json.dumps({
    "grown": rounds[-1][0] - rounds[0][0],
    "descriptors": rounds[-1][1] - first[1],
    "threads": rounds[-1][2] - first[2],
    "threads of the system": rounds[-1][3] - first[3],
}))
""",
        *places,
    )
    assert found["grown"] < MIB // 2, found  # over 300 rounds of a file
    assert found["descriptors"] == 0, found
    assert found["threads"] == 0, found
    assert found["threads of the system"] <= 0, found


def test_a_load_that_fails_leaves_nothing_behind(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bad = save(tmp_path / "bad.safetensors", {"m.weight": codes([[0x7F]] * 4096), "m.weight_scale": torch.ones(1)})
    found = measured(
        """
bad = sys.argv[4]
def failed():
    for _ in range(50):
        try:
            n.load_state_dict(bad, threads=4)
        except n.WeightError:
            pass
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()
first = failed()
print(json.dumps({"more": [b - a for a, b in zip(first, failed())]}))
""",
        *places,
        bad,
    )
    assert found["more"] == [0, 0]

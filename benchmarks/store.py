"""Loading from a store on the loopback: against the bare library at equal concurrency, and against copy-then-load.

The server is a process of its own that answers ranges by sendfile, so what is measured is the client: how much of the
library's throughput is left once the bytes are translated into tensors, and the CPU time that a gigabyte costs. With
``--rate`` each connection gives so much and no more, as a store's do (S3: some 85 MB/s). Latency is not measured.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import torch

from neuron_fp8_loader import load_state_dict
from neuron_fp8_loader.checkpoint.fetch import REQUEST, REQUESTS_ENV, pump, requests_at_once

from .common import WrongAnswer, console, interleaved, out_option, summarize, table, write
from .made import Made, make


class Files(BaseHTTPRequestHandler):
    """Files below the working directory, by range, with the ETag that S3 would have."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = Path(unquote(self.path).lstrip("/"))
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size, asked = path.stat().st_size, self.headers.get("Range")
        start, end = 0, size
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(size, int(last) + 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.flush()
            with path.open("rb") as file:
                rate = float(os.environ.get("RATE", "0")) * 1e6
                begin, first = time.monotonic(), start
                while start < end:
                    most = 1 << 20 if rate else end - start
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, min(most, end - start))
                    if rate:
                        time.sleep(max(0.0, begin + (start - first) / rate - time.monotonic()))


def serve() -> None:
    """Serve the working directory until the parent goes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


@contextmanager
def serving(directory: Path, rate: float = 0) -> Iterator[str]:
    command = [sys.executable, "-c", "from benchmarks.store import serve; serve()"]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "RATE": str(rate)}
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()


def bare(url: str, made: Made, *, keep: bool) -> list[Any]:
    """The library alone: the same ranges, as many at once; the bytes thrown away, or kept as a loader must."""
    import obstore
    from obstore.store import from_url

    store = from_url(url, client_options={"allow_http": True})
    jobs = [(file.name, at, min(at + REQUEST, file.stat().st_size))
            for file in made.files for at in range(0, file.stat().st_size, REQUEST)]  # fmt: skip

    kept: list[Any] = []

    def get(job: tuple[str, int, int]) -> Any:
        name, start, end = job
        return obstore.get(store, name, options={"range": (start, end)}).bytes()

    pump(jobs, get, lambda job, got: kept.append(got if keep else None))
    return kept


def copy_then_load(url: str, made: Made) -> dict[str, torch.Tensor]:
    import obstore
    from obstore.store import from_url

    store = from_url(url, client_options={"allow_http": True, "timeout": "600s"})
    with tempfile.TemporaryDirectory() as directory:

        def copy(name: str) -> None:
            with open(Path(directory) / name, "wb") as file:
                for chunk in obstore.get(store, name).stream(min_chunk_size=8 << 20):
                    file.write(chunk)

        pump([file.name for file in made.files], copy, lambda name, _: None)
        for index in made.directory.glob("*.json"):
            shutil.copy(index, directory)
        return load_state_dict(directory)


def measured(work: Any) -> tuple[float, float]:
    """(seconds, seconds of this process's CPU)."""
    begin, cpu = time.perf_counter(), time.process_time()
    result = work()
    found = time.perf_counter() - begin, time.process_time() - cpu
    del result
    return found


def check(made: Made, loaded: dict[str, torch.Tensor]) -> None:
    for name, tensor in loaded.items():
        if zlib.crc32(tensor.contiguous().view(torch.uint8).numpy()) != made.crc["half"][name]:
            raise WrongAnswer(f"{name} is not what ml_dtypes makes of it")


def peak(url: str) -> int:
    """Bytes that a load takes at its peak beyond a process that has loaded nothing."""
    code = (
        "import re, sys, neuron_fp8_loader as n; from neuron_fp8_loader.checkpoint import open_checkpoint\n"
        "def high(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10\n"
        "open_checkpoint(sys.argv[1]); before = high()\n"
        "n.load_state_dict(sys.argv[1]); print(high() - before)"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code, url], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


@click.command(context_settings={"show_default": True})
@click.option("--size", "mib", type=click.IntRange(min=64), default=1024, help="MiB of weights.")
@click.option("--shards", type=click.IntRange(min=1), default=4)
@click.option("--requests", type=click.IntRange(min=1), multiple=True, default=(1, 8, 16), help="Under way at once.")
@click.option("--rate", type=click.FloatRange(min=0), default=0, help="MB/s of a connection; 0: as fast as it goes.")
@click.option("--repeats", type=click.IntRange(min=1), default=5)
@out_option
def main(mib: int, shards: int, requests: tuple[int, ...], rate: float, repeats: int, out: Path) -> None:
    """Throughput and CPU time of loads from a store on the loopback."""
    results: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as place:
        made = make(Path(place) / "made", mib << 20, shards=shards)
        with serving(made.directory, rate) as url:
            check(made, load_state_dict(url))
            for count in requests:
                os.environ[REQUESTS_ENV] = str(count)
                assert requests_at_once() == count
                runs = interleaved(
                    {
                        "obstore, bytes kept": lambda: measured(lambda: bare(url, made, keep=True)),
                        "obstore, bytes dropped": lambda: measured(lambda: bare(url, made, keep=False)),
                        "load_state_dict(url)": lambda: measured(lambda: load_state_dict(url)),
                        "copy, then load": lambda: measured(lambda: copy_then_load(url, made)),
                    },
                    repeats,
                )
                reference = [seconds for seconds, _ in runs["obstore, bytes kept"]]
                for name, pairs in runs.items():
                    found = summarize([seconds for seconds, _ in pairs], made.nbytes, reference)
                    found["cpu_s_per_gb"] = sorted(cpu for _, cpu in pairs)[len(pairs) // 2] / (made.nbytes / 1e9)
                    results[f"{name}, {count}"] = found
                    rows.append(
                        [str(count), name, f"{found['gb_per_s']:.2f}", f"{found['speedup']:.2f}",
                         f"{found['cpu_s_per_gb']:.2f}"]
                    )  # fmt: skip
            results["peak"] = {"bytes": peak(url), "of": made.nbytes}
    table("A store on the loopback", ["requests", "", "GB/s", "x obstore, kept", "CPU s / GB"], rows)
    beyond = results["peak"]["bytes"] - made.nbytes
    console.print(
        f"peak: {results['peak']['bytes'] / made.nbytes:.2f} x the tensors ({beyond / 1e6:.0f} MB beyond them, "
        f"{max(requests)} requests of {REQUEST >> 20} MiB under way: at most {max(requests) * REQUEST / 1e6:.0f} MB; "
        f"{math.ceil(made.nbytes / REQUEST)} requests)"
    )
    write(
        out,
        f"store_{rate:g}" if rate else "store",
        {"mib": mib, "shards": shards, "requests": requests, "rate": rate, "repeats": repeats},
        results,
    )


if __name__ == "__main__":
    main()

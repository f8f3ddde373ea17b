"""Repositories of the Hugging Face Hub: the cache, downloads that were asked for, and headers read from afar."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from neuron_fp8_loader import CheckpointError, load_state_dict, plan_checkpoint
from neuron_fp8_loader.host.cache import forget
from tests.cli.helpers import run, run_json
from tests.servers import Handler, serving
from tests.support import DATA, ROOT, blob

hub = pytest.importorskip("huggingface_hub", reason="the extra 'hub' is not installed")
constants = pytest.importorskip("huggingface_hub.constants")

SHA = "0123456789abcdef0123456789abcdef01234567"
NAME = "org/tiny-fp8"
LOCAL = DATA / "hf_fp8_block"


@dataclass
class Hub:
    """Repositories with one commit each, and what was asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    """(method, path, bytes that were sent)."""
    url: str = ""

    def sent(self, end: str) -> int:
        return sum(n for method, path, n in self.requests if method == "GET" and path.endswith(end))


class _Handler(Handler):
    hub: Hub

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        files = self.hub.repositories.get(name)
        if files is None:
            return self._send(404, b"no", {"X-Error-Code": "RepoNotFound"})
        if len(rest) > 1 and rest[1] not in ("main", SHA):
            return self._send(404, b"no", {"X-Error-Code": "RevisionNotFound"})
        entries = [self._entry(file, content) for file, content in files.items()]
        if api and rest[:1] == ["tree"]:
            return self._json(entries)
        if api and rest[:1] == ["paths-info"]:
            asked = set(parse_qs(body).get("paths", [])) or set(
                (json.loads(body) if body[:1] == "{" else {}).get("paths", [])
            )
            return self._json([e for e in entries if e["path"] in asked])
        if api:
            siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            return self._json(
                {"id": name, "modelId": name, "sha": SHA, "siblings": siblings, "tags": [], "private": False}
            )
        if name in self.hub.gated:
            return self._send(403, b"no", {"X-Error-Code": "GatedRepo"})
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self._send(404, b"no", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        asked_range = self.headers.get("Range")
        if not asked_range:
            return self._send(200, content, headers)
        first, last = asked_range.removeprefix("bytes=").split("-")
        end = min(len(content), int(last or len(content)) + 1)
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        return self._send(206, content[int(first) : end], headers)

    def _entry(self, file: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(content).hexdigest()
        entry = {"type": "file", "path": file, "size": len(content), "oid": oid}
        if file.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        sent = 0 if self.command == "HEAD" else len(body)
        self.hub.requests.append((self.command, unquote(urlsplit(self.path).path), sent))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if sent:
            self.wfile.write(body)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one repository, and an empty cache."""
    made = Hub({NAME: {file.name: file.read_bytes() for file in LOCAL.iterdir() if file.is_file()}})
    made.repositories[NAME]["consolidated.safetensors"] = b"the same again" * 1000
    monkeypatch.chdir(tmp_path)
    forget()  # headers are known by what they are, whichever server has them
    with serving(type("Handler", (_Handler,), {"hub": made})) as url:
        made.url = url
        # the library reads its environment once, when it is imported
        for name, value in (
            ("ENDPOINT", url),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_HUB_DISABLE_XET", True),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_ENDPOINT", url)  # so that another store is opened for each test
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield made


def error_of(path: object, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


def same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    assert all(blob(found[name]) == blob(tensor) for name, tensor in expected.items())


def test_nothing_is_downloaded_unless_asked(there: Hub, tmp_path: Path) -> None:
    expected = load_state_dict(LOCAL)
    text = error_of(NAME)
    assert text.startswith(f"{NAME}: is neither a path nor a repository in the Hub cache")
    assert "--headers-only" in text
    for command in ("inspect", "config", "verify"):
        assert run(command, NAME).exit_code == 2
    assert there.requests == []

    same(load_state_dict(NAME, download=True), expected)
    assert there.sent("consolidated.safetensors") == 0  # the same weights again
    there.requests.clear()
    for given in (NAME, f"hf://{NAME}", f"{NAME}@main", f"{NAME}@{SHA}", f"hf://{NAME}@main"):
        same(load_state_dict(given), expected)
    same(load_state_dict(tmp_path / "cache" / "models--org--tiny-fp8"), expected)  # the root leads to the snapshot
    assert run("verify", NAME).exit_code == 0
    assert plan_checkpoint(NAME).to_dict()["pairs"] == plan_checkpoint(LOCAL).to_dict()["pairs"]
    assert there.requests == []


def test_an_existing_path_wins(there: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny-fp8").mkdir(parents=True)
    assert error_of(NAME, download=True).startswith(f"{NAME}: no checkpoint here")
    assert "no such file or directory" in error_of("org/other")  # org is a directory, so it is meant as a path
    assert "no such file or directory" in error_of("./org/other")
    assert "no such file or directory" in error_of(tmp_path / "a")
    assert there.requests == []


def test_the_command_downloads_when_told(there: Hub) -> None:
    result = run("config", NAME, "--download")
    assert result.exit_code == 0
    assert f"snapshots/{SHA}" in result.stdout
    assert there.sent("model.safetensors") == len(there.repositories[NAME]["model.safetensors"])


def test_headers_alone_are_read_from_the_hub(there: Hub, tmp_path: Path) -> None:
    big = there.repositories[NAME]
    expected = run_json("inspect", LOCAL, "--headers-only")
    found = run_json("inspect", NAME, "--headers-only")
    assert {**found, "checkpoint": ""} == {**expected, "checkpoint": ""}
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))
    assert there.sent("model.safetensors") <= max(256 << 10, len(big["model.safetensors"]))
    plan = plan_checkpoint(f"hf://{NAME}@main", headers_only=True)
    assert plan.to_dict()["pairs"] == plan_checkpoint(LOCAL).to_dict()["pairs"]


def test_no_weights_are_read_for_headers(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_fp8_loader.checkpoint.remote.HEAD", 64)  # no more than is needed
    content = there.repositories[NAME]["model.safetensors"]
    assert run("inspect", NAME, "--headers-only").exit_code == 0
    header = 8 + int.from_bytes(content[:8], "little")
    assert there.sent("model.safetensors") == header < len(content)
    assert sum(path.endswith("model.safetensors") for _, path, _ in there.requests) <= 2


def test_a_cache_that_is_not_whole(there: Hub, tmp_path: Path) -> None:
    hub.snapshot_download(NAME, allow_patterns=["config.json"])
    assert "what is in the cache is not whole: no checkpoint here" in error_of(NAME)
    same(load_state_dict(NAME, download=True), load_state_dict(LOCAL))


def test_what_the_hub_refuses(there: Hub) -> None:
    there.repositories["org/gated"] = dict(there.repositories[NAME])
    there.gated.add("org/gated")
    assert "is neither a path nor a repository on the Hub that you may see" in error_of("org/other", download=True)
    assert "org/tiny-fp8@v9: the repository has no revision 'v9'" in error_of(f"{NAME}@v9", download=True)
    assert "org/gated: is gated: accept its terms" in error_of("org/gated", download=True)
    result = run("inspect", "org/gated", "--headers-only")
    assert result.exit_code == 2
    assert "is gated" in result.stderr


def test_without_the_extra(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'neuron-fp8-loader[hub]'" in error_of(NAME)


def test_the_environment_of_the_library_counts(there: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": there.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from neuron_fp8_loader.cli import main; main()"]
    shown = subprocess.run(
        [*command, "inspect", NAME, "--headers-only"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout.startswith(f"checkpoint   {NAME}: "), shown.stderr


def test_offline_is_offline(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    load_state_dict(NAME, download=True)
    there.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(load_state_dict(NAME), load_state_dict(LOCAL))
    assert "HF_HUB_OFFLINE is set" in error_of("org/other", download=True)
    assert there.requests == []

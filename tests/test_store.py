"""Checkpoints in object stores: the same bytes by every way of loading, and what happens when the store fails."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as plain_load_file

from neuron_fp8_loader import (
    CheckpointError,
    load_checkpoint,
    load_file,
    load_state_dict,
    plan_checkpoint,
    safe_open,
)
from neuron_fp8_loader.checkpoint import fetch, remote, store
from neuron_fp8_loader.host.cache import forget
from neuron_fp8_loader.tools.scan import scan_checkpoint
from tests.servers import Bucket, Request, bucket_server
from tests.support import DATA, ROOT, TINY, blob, random_codes, save, save_shards

pytest.importorskip("obstore", reason="the extra 's3' is not installed")

KEPT = [d.name for d in sorted(DATA.iterdir()) if (d / "config.json").is_file()]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"method": "ratio", "always": True},
    {"layout": "per_channel"},
    {"dequantize": ["*"]},
    {"experts": "fused", "layout": "per_channel"},
]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with bucket_server() as made:
        environment(monkeypatch, made.url)
        quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
        retry = {"max_retries": 3, "retry_timeout": timedelta(seconds=20), "backoff": quick}
        monkeypatch.setattr(store, "RETRY", retry)
        yield made


def environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")


def small_requests(monkeypatch: pytest.MonkeyPatch, nbytes: int, gap: int = 0) -> None:
    monkeypatch.setattr("neuron_fp8_loader.checkpoint.fetch.REQUEST", nbytes)
    monkeypatch.setattr("neuron_fp8_loader.checkpoint.remote_source.REQUEST", nbytes)
    monkeypatch.setattr("neuron_fp8_loader.checkpoint.fetch.GAP", gap)


def outcome(path: object, **options: Any) -> Any:
    """The state dict, or the error without the place."""
    try:
        return load_state_dict(path, **options)  # type: ignore[arg-type]
    except Exception as error:
        return str(error).replace(str(path), "PLACE")


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert found == expected
        return
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert blob(found[name]) == blob(tensor), name


def some_weights(directory: Path, *, rows: int = 256, columns: int = 512, count: int = 3) -> Path:
    """Row-scaled weights that do not fit, in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for n in range(count):
        tensors[f"layers.{n}.proj.weight"] = random_codes((rows, columns), seed=n)
        tensors[f"layers.{n}.proj.weight_scale"] = torch.rand(rows, 1) + 0.5
    directory.mkdir(exist_ok=True)
    save(directory / "model.safetensors", tensors)
    return directory


def error_of(path: object, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


# -- the same bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KEPT, "tiny-llama-fp8"])
def test_the_state_dict_is_that_of_the_files(name: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    local = TINY if name == "tiny-llama-fp8" else DATA / name
    url = bucket.put(local, f"some/{name}")
    for request in (16 << 20, 40_000 if local == TINY else 5000):  # as it is, and so that large tensors lie in several
        small_requests(monkeypatch, request)
        for options in OPTIONS:
            same(outcome(url, **options), outcome(local, **options))
    same(outcome(f"{bucket.url}/models/some/{name}"), outcome(local))  # plain HTTP, where nothing can be listed


def test_slices(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("hf_fp8_block", {"*.q_proj.weight": (0, 0, 64)}, {"layout": "per_channel"}),
        ("hf_fp8_block", {"*.down_proj.weight": (1, 32, 96), "*.up_proj.weight": (1, 5, 77)}, {"dequantize": ["*"]}),
        ("hf_fp8_block", {"*.down_proj.weight": (1, 32, 96)}, {"layout": "per_channel"}),
        ("ct_fp8_dynamic_moe", {"*.gate_proj.weight": (0, 16, 48), "*.down_proj.weight": (1, 16, 48)}, {}),
    ]
    for request, gap in ((16 << 20, 1 << 20), (3000, 0), (3000, 50)):
        small_requests(monkeypatch, request, gap)
        for name, slices, options in cases:
            url = bucket.put(DATA / name, name)
            same(
                load_state_dict(url, slices=slices, **options), load_state_dict(DATA / name, slices=slices, **options)
            )
    verdict = scan_checkpoint(url).verdict
    same(
        load_state_dict(url, slices=slices, verdict=verdict),
        load_state_dict(DATA / name, slices=slices, verdict=verdict),
    )


def test_rows_are_read_by_themselves(tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    load_state_dict(url)
    small_requests(monkeypatch, 1 << 20)
    bucket.requests.clear()
    load_state_dict(url, slices={"*.weight": (0, 0, 64)})
    weights = [r for r in bucket.gets() if r.end - r.start >= 64 * 512]
    assert sum(r.end - r.start for r in weights) == 3 * 64 * 512
    monkeypatch.setattr("neuron_fp8_loader.checkpoint.fetch.GAP", 1 << 20)
    bucket.requests.clear()
    load_state_dict(url, slices={"*.weight": (0, 0, 64)})
    assert len(bucket.gets()) == 2  # the scales, then the weights with what lies between


def test_one_shard(bucket: Bucket) -> None:
    local = DATA / "derived_split_shards"
    url = bucket.put(local, "split")
    for file in sorted(local.glob("*.safetensors")):
        found, expected = load_file(f"{url}/{file.name}"), load_file(file)
        same(found, expected)
    index = next(local.glob("*.index.json")).name
    same(load_state_dict(f"{url}/{index}"), load_state_dict(local))
    loaded = load_checkpoint(url)
    assert loaded.metadata == load_checkpoint(local).metadata
    assert loaded.plan.source == url


def test_safe_open(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    small_requests(monkeypatch, 30_000)
    url = bucket.put(TINY, "tiny")
    with safe_open(f"{url}/model.safetensors") as there, safe_open(TINY / "model.safetensors") as here:
        assert sorted(there.keys()) == sorted(here.keys())
        assert there.offset_keys() == here.offset_keys()
        assert there.metadata() == here.metadata()
        same(there.get_tensors(), here.get_tensors())
        for name in here.offset_keys()[:8]:
            one, other = there.get_slice(name), here.get_slice(name)
            assert (one.get_shape(), one.get_dtype()) == (other.get_shape(), other.get_dtype())
            indices: list[Any] = [slice(None), slice(3, 9), slice(2, 2)]
            if len(other.get_shape()) == 2:
                indices += [(slice(1, 7), slice(2, 5)), (slice(None), slice(0, 1)), 2, (..., slice(1, 3))]
            for index in indices:
                assert blob(one[index]) == blob(other[index]), (name, index)


def test_torch_distributed_checkpoint(bucket: Bucket) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    reader = pytest.importorskip("neuron_fp8_loader.integrations.dcp").NeuronStorageReader
    url = bucket.put(DATA / "hf_fp8_block", "block")
    expected = load_state_dict(DATA / "hf_fp8_block", always=True, layout="per_channel")
    found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, storage_reader=reader(url, layout="per_channel"), no_dist=True)
    same(found, expected)


def test_the_commands_say_the_same(bucket: Bucket) -> None:
    from tests.cli.helpers import run, run_json

    for name in ("hf_fp8_block", "modelopt_fp8_kv"):
        url = bucket.put(DATA / name, name)
        for command in (("inspect",), ("inspect", "--headers-only"), ("verify",), ("config",)):
            there, here = (run_json(command[0], place, *command[1:]) for place in (url, DATA / name))
            assert "error" not in here
            text = str(there).replace(url, str(DATA / name))
            assert text == str(here), command
        bucket.requests.clear()
        run("inspect", url, "--headers-only")
        assert all(r.start == 0 for r in bucket.gets(".safetensors"))  # nothing beyond the header was asked for
    assert run("export", url, "/nonexistent/out").exit_code == 2
    local, there = plan_checkpoint(DATA / name).to_dict(), plan_checkpoint(url).to_dict()
    assert {**there, "source": ""} == {**local, "source": ""}


def test_an_s3_server_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    localbucket = pytest.importorskip("localbucket", reason="localbucket is not installed (extra 'test')")
    from tests.servers import serving

    shutil.copytree(DATA / "derived_split_shards", tmp_path / "models" / "a b" / "split")
    shutil.copytree(DATA / "modelopt_fp8_kv", tmp_path / "models" / "kv")
    handler = type(
        "Handler",
        (localbucket.S3Handler,),
        {"data_root": tmp_path, "log_message": lambda *a: None, "disable_nagle_algorithm": True},
    )
    with serving(handler) as endpoint:
        environment(monkeypatch, endpoint)
        for prefix, name in (("a b/split", "derived_split_shards"), ("kv", "modelopt_fp8_kv")):
            for options in OPTIONS[:3]:
                same(outcome(f"s3://models/{prefix}", **options), outcome(DATA / name, **options))
        assert "no such object" in error_of("s3://models/other")


# -- how it is asked -----------------------------------------------------------------------------------------------


def test_requests_are_few(tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    small_requests(monkeypatch, 64 << 10, 1 << 20)
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    for options in ({}, {"always": True}, {"dequantize": ["*"]}):
        bucket.requests.clear()
        load_state_dict(url, **options)
        size = len(bucket.objects["m/model.safetensors"])
        assert len(bucket.gets("model.safetensors")) <= math.ceil(size / (64 << 10)) + 2
        assert bucket.nbytes("model.safetensors") <= size + remote.HEAD


def test_requests_of_16_mib(tmp_path: Path, bucket: Bucket) -> None:
    some_weights(tmp_path / "m", rows=4096, columns=8192, count=1)
    url = bucket.put(tmp_path / "m", "m")
    loaded = load_state_dict(url)
    assert blob(loaded["layers.0.proj.weight"]) == blob(load_state_dict(tmp_path / "m")["layers.0.proj.weight"])
    gets = bucket.gets("model.safetensors")
    assert len(gets) <= math.ceil(len(bucket.objects["m/model.safetensors"]) / (16 << 20)) + 2 == 5
    assert max(r.end - r.start for r in gets) == 16 << 20


def test_experts_are_read_ahead_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    small_requests(monkeypatch, 32 << 10, 1 << 20)
    monkeypatch.setenv(fetch.REQUESTS_ENV, "3")
    url = bucket.put(DATA / "ct_fp8_dynamic_moe", "moe")
    bucket.delay = 0.002
    options: dict[str, Any] = {"experts": "fused", "layout": "per_channel", "always": True}
    same(load_state_dict(url, **options), load_state_dict(DATA / "ct_fp8_dynamic_moe", **options))
    size = sum(len(o) for key, o in bucket.objects.items() if key.endswith(".safetensors"))
    # experts and the rest are read apart, and both may begin and end inside of a request
    assert len(bucket.gets(".safetensors")) <= 2 * math.ceil(size / (32 << 10)) + 2


def test_many_requests_are_under_way_but_no_more_than_allowed(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_requests(monkeypatch, 16 << 10)
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    bucket.delay = 0.005
    monkeypatch.setenv(fetch.REQUESTS_ENV, "5")
    load_state_dict(url)
    assert 2 <= bucket.most <= 10  # the server may still count those that it has just answered; without a limit: 16
    monkeypatch.setenv(fetch.REQUESTS_ENV, "none")
    with pytest.raises(ValueError, match="expected a whole number"):
        load_state_dict(url)


def test_two_hundred_shards(tmp_path: Path, bucket: Bucket) -> None:
    shards = [{f"layers.{n}.weight": random_codes((8, 16), seed=n), f"layers.{n}.weight_scale": torch.ones(8, 1)}
              for n in range(200)]  # fmt: skip
    save_shards(tmp_path, *shards)
    url = bucket.put(tmp_path, "many")
    bucket.delay = 0.002
    same(load_state_dict(url), load_state_dict(tmp_path))
    assert bucket.most > 4  # headers too
    assert len([r for r in bucket.requests if r.method == "LIST"]) <= 6  # of 100 objects each, ours and the one above
    assert len(bucket.gets(".safetensors")) == 400
    bucket.requests.clear()
    load_state_dict(url)
    assert len(bucket.gets()) <= 201  # headers are known; a config that is not there costs nothing


def test_names_of_all_kinds(tmp_path: Path, bucket: Bucket) -> None:
    some_weights(tmp_path / "m", rows=4, columns=8, count=1)
    for prefix in ("with space", "größe/模型", "a+b", "100%", "a#b&c=d", "x~y", "q?x"):
        url = bucket.put(tmp_path / "m", prefix)
        same(load_state_dict(url), load_state_dict(tmp_path / "m"))
        same(load_file(f"{url}/model.safetensors"), load_file(tmp_path / "m" / "model.safetensors"))
    same(load_state_dict(Path(url)), load_state_dict(tmp_path / "m"))  # pathlib makes one slash of two


# -- when it goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["503", "500", "cut"])
def test_what_passes_is_asked_for_again(
    fault: str, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_requests(monkeypatch, 64 << 10)
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    failed: set[int] = set()

    def once(request: Request) -> str | None:
        if request.end in failed:  # after a cut, the rest of the range is asked for
            return None
        failed.add(request.end)
        return fault

    bucket.fault = once
    same(load_state_dict(url), load_state_dict(tmp_path / "m"))
    assert len(failed) > 5
    bucket.fault = lambda request: fault if request.start else None
    assert "m/model.safetensors" in error_of(url)  # after the retries


def test_a_slow_drip_is_asked_for_again(tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CLIENT", {"timeout": "300ms", "connect_timeout": "1s"})
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    seen: list[Request] = []
    bucket.fault = lambda request: (seen.append(request), "drip" if len(seen) == 2 else None)[1]
    same(load_state_dict(url), load_state_dict(tmp_path / "m"))
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("short", "m/model.safetensors"),
        ("whole", "does not answer requests for ranges"),
        ("403", "access is denied (AccessDenied): the credentials may lack s3:GetObject"),
        ("400", "have expired"),
    ],
)
def test_what_does_not_pass_is_an_error(fault: str, says: str, tmp_path: Path, bucket: Bucket) -> None:
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    bucket.fault = lambda request: fault if request.start else None  # the data, not the header
    assert says in error_of(url)
    bucket.fault = lambda request: fault if request.method == "GET" else None
    assert says in error_of(url)


@pytest.mark.parametrize("tagged", [True, False])
def test_an_object_replaced_in_the_middle(
    tagged: bool, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_requests(monkeypatch, 64 << 10)
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    key = "m/model.safetensors"
    place = url if tagged else f"{bucket.url}/models/m"
    bucket.tagged = tagged

    def replace(request: Request) -> None:
        if request.start > 200_000:
            other = bytearray(bucket.objects[key])
            other[-1] ^= 1
            bucket.objects[key] = bytes(other) if tagged else bytes(other[:-1])  # the length is all that tells

    bucket.fault = replace  # type: ignore[assignment]
    assert "m/model.safetensors: was replaced while it was read" in error_of(place)


def test_the_next_load_sees_the_new_object(tmp_path: Path, bucket: Bucket) -> None:
    for seed in range(3):
        save(
            tmp_path / "model.safetensors",
            {"w.weight": random_codes((8, 8), seed=seed), "w.weight_scale": torch.ones(8, 1)},
        )
        url = bucket.put(tmp_path, "m")
        same(load_state_dict(url), load_state_dict(tmp_path))


def test_what_is_not_there(tmp_path: Path, bucket: Bucket) -> None:
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    assert error_of("s3://models/nothing").startswith("s3://models/nothing: there is no such object")
    assert "there is no bucket 'wrong'" in error_of("s3://wrong/m")
    bucket.objects["docs/readme.md"] = b"x"
    assert "no checkpoint here" in error_of("s3://models/docs")
    assert "names no bucket" in error_of("s3://")
    bucket.objects["empty/model.safetensors"] = b""
    assert "empty/model.safetensors" in error_of("s3://models/empty")
    bucket.objects["cut/model.safetensors"] = bucket.objects["m/model.safetensors"][:-7]
    assert "cut/model.safetensors: not a complete safetensors file" in error_of("s3://models/cut")
    bucket.objects["pickled/pytorch_model.bin"] = b"PK"
    assert "pytorch_model.bin: .bin files are pickled" in error_of("s3://models/pickled")
    bucket.objects["m/model.safetensors.index.json"] = b"{"
    assert "m/model.safetensors.index.json: not" in error_of(url)
    with pytest.raises(CheckpointError, match="is a directory; load_file takes one"):
        load_file(url)


def test_a_shard_that_is_missing(bucket: Bucket) -> None:
    url = bucket.put(DATA / "derived_split_shards", "split")
    gone = next(key for key in bucket.objects if key.endswith(".safetensors"))
    del bucket.objects[gone]
    assert f"missing shard {gone.rpartition('/')[2]}" in error_of(url)


def test_a_url_for_one_request_keeps_its_secret() -> None:
    text = error_of("https://models.s3.amazonaws.com/m/model.safetensors?X-Amz-Signature=secret")
    assert "is a URL with a query, as presigned ones are" in text
    assert "secret" not in text


def test_a_metadata_service_that_refuses_is_not_s3(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    def refuse(*_: object) -> None:
        raise obstore.exceptions.GenericError(
            "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1ms - "
            "Server returned non-2xx status code: 403 Forbidden"
        )

    monkeypatch.setattr(obstore, "list_with_delimiter", refuse)
    assert "s3://models/m: no AWS credentials were found (Generic S3 error: Error performing PUT" in error_of(
        "s3://models/m"
    )


def test_credentials_that_are_missing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "no AWS credentials were found (Generic S3 error: Missing AccessKeyId" in error_of("s3://models/m")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # no instance
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert "no AWS credentials were found: export AWS_ACCESS_KEY_ID" in error_of("s3://models/m")
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert "the credentials are in the profile 'work', which is read by boto3: pip install boto3" in error_of(
        "s3://models/m"
    )
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")  # a public bucket
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    same(load_state_dict(url), load_state_dict(tmp_path / "m"))


def test_the_region_of_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bucket: Bucket) -> None:
    (tmp_path / "config").write_text("[default]\nregion = eu-west-1\n[profile work]\nregion=ap-south-1\n")
    for profile, region in (("", "eu-west-1"), ("work", "ap-south-1"), ("none", "")):
        assert store._region(tmp_path / "config", profile) == region
    bucket.fault = lambda request: "redirect"
    assert "lies in another region: set AWS_REGION" in error_of("s3://models/m")


def test_who_may_read_but_not_list(tmp_path: Path, bucket: Bucket) -> None:
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    bucket.fault = lambda request: "403" if request.method == "LIST" else None
    same(load_state_dict(url), load_state_dict(tmp_path / "m"))
    same(load_file(f"{url}/model.safetensors"), load_state_dict(tmp_path / "m"))
    assert "s3:ListBucket" in error_of("s3://models/other")


@pytest.mark.parametrize("what", ["listing", "headers", "data", "experts"])
def test_an_interrupt_does_not_wait_for_the_store(what: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    small_requests(monkeypatch, 32 << 10)
    local = DATA / "ct_fp8_dynamic_moe"
    url = bucket.put(local, "moe")
    options: dict[str, Any] = {"experts": "fused", "layout": "per_channel"} if what == "experts" else {}
    hold, waiting = threading.Event(), threading.Event()

    def block(request: Request) -> None:
        held = {"listing": request.method == "LIST", "headers": request.method == "GET"}
        if held.get(what, request.start > 200_000):
            waiting.set()
            hold.wait(60)

    bucket.fault = block  # type: ignore[assignment]

    def interrupt() -> None:
        if waiting.wait(30):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            load_state_dict(url, **options)
        assert waiting.is_set()
        assert not hold.is_set()
    finally:
        hold.set()
    bucket.fault = None
    same(load_state_dict(url, **options), load_state_dict(local, **options))


def test_loads_side_by_side(bucket: Bucket) -> None:
    url, local = bucket.put(DATA / "derived_split_shards", "split"), DATA / "derived_split_shards"
    expected, found = load_state_dict(local), list[Any]()
    threads = [threading.Thread(target=lambda: found.append(outcome(url))) for _ in range(8)]
    forget()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for one in found:
        same(one, expected)


_FORKS = """
import os, sys
from neuron_fp8_loader import CheckpointError, load_state_dict
def child():
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            code = 0 if len(load_state_dict(sys.argv[1])) == 6 else 8
        except CheckpointError as error:
            code = 3 if "was forked from one that had read from a store" in str(error) else 7
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
before = child()
load_state_dict(sys.argv[1])
print(before, child())
"""


def test_a_fork(tmp_path: Path, bucket: Bucket) -> None:
    url = bucket.put(some_weights(tmp_path / "m"), "m")
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, url], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.split() == ["0", "3"]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    monkeypatch.setenv("AWS_REGION", "nowhere-1")
    assert (
        "s3://models/m: is read by obstore, which is not installed: pip install 'neuron-fp8-loader[s3]'"
        in error_of("s3://models/m")
    )


def test_the_bytes_that_are_not_fp8_are_those_of_safetensors(bucket: Bucket) -> None:
    url = bucket.put(TINY, "tiny")
    plain = plain_load_file(TINY / "model.safetensors")
    loaded = load_state_dict(url)
    untouched = [n for n, t in plain.items() if t.dtype == torch.bfloat16 and not n.endswith("_scale")]
    assert len(untouched) > 5
    same({n: loaded[n] for n in untouched}, {n: plain[n] for n in untouched})

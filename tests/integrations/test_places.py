"""Checkpoints in a store and on the Hub, through NxD Inference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.apps import app_for
from tests.integrations.checkpoints import state_dict, write
from tests.integrations.conftest import Standin
from tests.integrations.test_loading import same_bytes
from tests.servers import bucket_server
from tests.test_store import environment


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_a_store_loads_as_the_directory_does(
    enabled: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    pytest.importorskip("obstore", reason="the extra 's3' is not installed")
    path = write(tmp_path, state_dict(), form)
    expected = app_for(enabled, path)
    with bucket_server() as bucket:
        environment(monkeypatch, bucket.url)
        url = bucket.put(Path(path), "some/model")
        app = app_for(enabled, path, quantized_checkpoints_path=url)
        assert app.config.neuron_config.modules_to_not_convert == expected.config.neuron_config.modules_to_not_convert
        assert same_bytes(app.checkpoint_loader_fn(), expected.checkpoint_loader_fn())
        assert app.config.neuron_config.quantized_checkpoints_path == url  # as it was given
        bucket.fault = lambda request: "403" if request.start else None
        with pytest.raises(Exception, match="access is denied"):
            app.checkpoint_loader_fn()
        assert app.config.neuron_config.quantized_checkpoints_path == url


def test_a_name_of_the_hub_is_its_snapshot(enabled: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra 'hub' is not installed")
    root = tmp_path / "cache" / "models--org--name"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    path = write(tmp_path / "elsewhere", state_dict())
    for file in Path(path).iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    app = app_for(enabled, path, quantized_checkpoints_path="org/name")
    assert app.config.neuron_config.quantized_checkpoints_path == str(snapshot)
    assert same_bytes(app.checkpoint_loader_fn(), app_for(enabled, path).checkpoint_loader_fn())
    other = app_for(enabled, path, quantized_checkpoints_path="org/other")
    assert other.config.neuron_config.quantized_checkpoints_path == "org/other"

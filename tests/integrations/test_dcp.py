"""``NeuronStorageReader``: what torch.distributed.checkpoint puts into parameters, against the whole dict's bytes."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import REAL, blob, codes, e4m3fn, expand, random_codes, same_bytes, save, save_shards, shared

from neuron_fp8_loader import load_state_dict
from neuron_fp8_loader.errors import CheckpointError, OptionError, PlanError
from neuron_fp8_loader.tools.scan import scan_checkpoint

pytest.importorskip("torch.distributed.checkpoint.hf_storage", reason="this torch has no HuggingFaceStorageReader")

from neuron_fp8_loader.integrations.dcp import NeuronStorageReader

from .dcp_ranks import each_rank


def load(state_dict: dict[str, torch.Tensor], path, **options) -> dict[str, torch.Tensor]:
    """``dcp.load`` in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state_dict, storage_reader=NeuronStorageReader(path, **options), no_dist=True)
    return state_dict


def empty_like(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full(t.shape, 0).to(t.dtype) for name, t in whole.items()}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {
        "row.weight": random_codes((66, 40), 1),
        "row.weight_scale": torch.rand(66, 1),
        "block.weight": random_codes((300, 260), 2),
        "block.weight_scale_inv": torch.rand(3, 3) + 0.1,
        "fits.weight": random_codes((64, 32), 3, top=0x77),
        "fits.weight_scale": torch.rand(1),
        "experts.weight": random_codes((5, 24, 16), 4),
        "experts.weight_scale": torch.rand(5, 24, 1),
        "few.weight": random_codes((3, 8), 5),
        "few.weight_scale": torch.rand(3, 1),
        "norm.weight": torch.rand(66).bfloat16(),
        "embed.weight": torch.rand(50, 12),
        "row.input_scale": torch.rand(1),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tensors):
    """Two shards, with pairs across them."""
    directory = tmp_path_factory.mktemp("checkpoint")
    names = list(tensors)
    save_shards(directory, *({n: tensors[n] for n in names[k::2]} for k in range(2)))
    return directory


# -- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"layout": "per_channel"}, {"dequantize": ["*"]}], ids=str)
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_whole(name, options):
    try:
        whole = load_state_dict(shared(name), always=True, **options)
    except PlanError:
        with pytest.raises(PlanError):
            NeuronStorageReader(shared(name), **options)
        return
    got = load(empty_like(whole), shared(name), **options)
    assert all(same_bytes(got[key], tensor) for key, tensor in whole.items())


def test_a_state_dict_made_from_the_metadata(checkpoint):
    """What changes size or dtype, or is no longer there, is told: torch makes the tensors itself here."""
    planner = importlib.import_module("torch.distributed.checkpoint.default_planner")._EmptyStateDictLoadPlanner
    options = {"layout": "per_channel", "dequantize": ["row"]}
    got: dict[str, torch.Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = importlib.import_module("torch.distributed.checkpoint.state_dict_loader")
        reader = NeuronStorageReader(checkpoint, **options)
        loader._load_state_dict(got, storage_reader=reader, planner=planner(), no_dist=True)
    whole = load_state_dict(checkpoint, always=True, **options)
    assert got.keys() == whole.keys()
    assert "row.weight_scale" not in got
    assert got["block.weight_scale_inv"].shape == (300, 1)
    assert all(same_bytes(got[name], tensor) for name, tensor in whole.items())


def test_strides_and_verdict(checkpoint, tensors):
    whole = load_state_dict(checkpoint)
    verdict = scan_checkpoint(checkpoint).verdict
    got = load({n: torch.zeros(40, 66).to(torch.float8_e4m3fn).t() if n == "row.weight" else t
                for n, t in empty_like(whole).items()}, checkpoint, verdict=verdict)  # fmt: skip
    assert all(same_bytes(got[name].contiguous(), tensor) for name, tensor in whole.items())
    assert same_bytes(got["fits.weight"], tensors["fits.weight"])


def test_another_checkpoint_by_its_id(checkpoint, tmp_path):
    save(tmp_path / "model.safetensors", {"x": torch.ones(3)})
    got = {"x": torch.zeros(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(got, checkpoint_id=str(tmp_path), storage_reader=NeuronStorageReader(checkpoint), no_dist=True)
    assert got["x"].tolist() == [1, 1, 1]


# -- what a parameter's dtype asks for -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["keep", "per_channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_into_floats(checkpoint, tensors, dtype, layout):
    """value x scale, not the codes' values; torch's own reader leaves the scale out."""
    kinds = {"row": "weight_scale", "block": "weight_scale_inv"}
    got = load({f"{k}.weight": torch.zeros(tensors[f"{k}.weight"].shape, dtype=dtype) for k in kinds}, checkpoint,
               layout=layout)  # fmt: skip
    for kind, scale in kinds.items():
        weight = tensors[f"{kind}.weight"]
        product = e4m3fn(weight).astype(np.float32) * expand(tensors[f"{kind}.{scale}"].numpy(), tuple(weight.shape))
        numpy_dtype = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
        assert blob(got[f"{kind}.weight"]) == product.astype(numpy_dtype).tobytes()


def test_unscaled_weights_into_floats(tmp_path):
    file = save(tmp_path / "model.safetensors", {"u.weight": codes([[0x7E, 0x40]])})
    assert load({"u.weight": torch.zeros(1, 2)}, file)["u.weight"].tolist() == [[448.0, 2.0]]
    with pytest.raises(dcp.CheckpointException, match="no scale to make up for"):
        load({"u.weight": torch.zeros(1, 2).to(torch.float8_e4m3fn)}, file)


def test_a_float_parameter_and_the_scale_too(checkpoint):
    asked = {"row.weight": torch.zeros(66, 40), "row.weight_scale": torch.zeros(66, 1)}
    with pytest.raises(
        dcp.CheckpointException, match=r"row\.weight: its parameter float32 takes value x scale, yet its scale row"
    ):
        load(asked, checkpoint)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("row.weight", torch.int8, r"is float8_e4m3fn and its parameter int8; make it float8_e4m3fn, or bfloat16"),
        ("row.weight", torch.float8_e5m2, r"is float8_e4m3fn and its parameter float8_e5m2"),
        ("embed.weight", torch.float8_e4m3fn, r"is float32 and its parameter float8_e4m3fn; a cast would change"),
        ("embed.weight", torch.int32, r"is float32 and its parameter int32; a cast would change"),
        (
            "row.weight_scale",
            torch.bfloat16,
            r"is float32, and its parameter bfloat16 would round it",
        ),
    ],
)
def test_dtypes_that_would_change_values(checkpoint, tensors, name, dtype, message):
    with pytest.raises(dcp.CheckpointException, match=message):
        load({name: torch.zeros(tensors[name].shape).to(dtype)}, checkpoint)


def test_dtypes_that_keep_values(tmp_path):
    tensors = {
        "m.weight": random_codes((4, 32)),
        "m.weight_scale": torch.full((4, 1), 120, dtype=torch.uint8),
        "norm": torch.rand(4).bfloat16(),
    }
    file = save(tmp_path / "model.safetensors", tensors)
    got = load({"m.weight_scale": torch.zeros(4, 1), "norm": torch.zeros(4)}, file)
    assert got["m.weight_scale"].flatten().tolist() == [2.0**-6] * 4
    assert torch.equal(got["norm"], tensors["norm"].float())


def test_codes_without_their_scale_are_told_of(checkpoint, caplog):
    with caplog.at_level(logging.WARNING, "neuron_fp8_loader"):
        load({"row.weight": torch.zeros(66, 40).to(torch.float8_e4m3fn)}, checkpoint)
    assert "codes without their scales" in caplog.text
    assert "row.weight" in caplog.text


def test_broken_checkpoints_are_refused_where_the_reader_is_made(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        NeuronStorageReader(tmp_path)
    with pytest.raises(OptionError, match="unknown option 'thread_count'"):
        NeuronStorageReader(tmp_path, thread_count=4)
    file = save(tmp_path / "model.safetensors", {"a.weight": codes([[0x7F]]), "a.weight_scale": torch.ones(1)})
    with pytest.raises(dcp.CheckpointException, match=r"a\.weight: 1 NaN codes"):
        load({"a.weight": torch.zeros(1, 1)}, file)


def test_what_ranks_saved_apart(tmp_path, tensors):
    """One rank's file is a whole; several are parts of tensors, of which none must pass for the whole."""
    state = {name: tensors[name] for name in ("row.weight", "row.weight_scale")}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=writer, no_dist=True)
    (file,) = tmp_path.glob("*.safetensors")
    assert all(same_bytes(load(empty_like(state), tmp_path)[n], t) for n, t in load_state_dict(file).items())
    (tmp_path / file.name.replace("shard-00001", "shard-00002")).write_bytes(file.read_bytes())
    for path in (tmp_path, file):
        with pytest.raises(CheckpointError, match="enable_consolidation=True"):
            NeuronStorageReader(path)


def test_an_older_torch(monkeypatch):
    name = "neuron_fp8_loader.integrations.dcp"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.hf_storage", None)
    with pytest.raises(ImportError, match=r"install a newer torch.*load_state_dict\(slices="):
        importlib.import_module(name)


# -- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_by_dtensor(checkpoint, tmp_path, ranks):
    """Rows, columns, both, not at all; uneven, and empty on some ranks."""
    imported_once = ["torch._dynamo", "torch.distributed.tensor", "neuron_fp8_loader.integrations.dcp"]
    torch.multiprocessing.set_forkserver_preload(imported_once)
    arguments = (ranks, checkpoint, str(tmp_path / "rendezvous"))
    torch.multiprocessing.start_processes(each_rank, arguments, nprocs=ranks, start_method="forkserver")

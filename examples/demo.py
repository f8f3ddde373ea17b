"""The main job on a real, tiny FP8 checkpoint: what a Neuron device would read without the loader, and with it.

python examples/demo.py [CHECKPOINT]

CHECKPOINT is a Llama in one model.safetensors, whose FP8 weights have a weight_scale of one value or one a row: a
forward in plain torch is run on it. Of any other, `neuron-fp8 inspect CHECKPOINT` says as much without one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_llama import logits

import neuron_fp8_loader
from neuron_fp8_loader import neuron_view

HERE = Path(__file__).resolve().parent


def show(what: str, values: torch.Tensor) -> None:
    finite = int(values.isfinite().sum())
    print(f"  {what}: {finite} of {values.numel()} logits finite")


def main(checkpoint: Path) -> int:
    file, config = checkpoint / "model.safetensors", {}
    if file.is_file() and (checkpoint / "config.json").is_file():
        config = json.loads((checkpoint / "config.json").read_text())
        pairs = neuron_fp8_loader.plan_checkpoint(file).pairs
        forms = {(pair.convention, pair.granularity.kind in ("tensor", "row")) for pair in pairs}
    if config.get("model_type") != "llama" or forms != {("weight_scale", True)}:
        sys.exit(f"{checkpoint}: not a checkpoint for the demo.\n{__doc__}")
    prompt = torch.randint(3, config["vocab_size"], (12,), generator=torch.Generator().manual_seed(0))

    print(f"Plan of {checkpoint.name} (headers only):")
    for line in neuron_fp8_loader.plan_checkpoint(checkpoint).summary().splitlines():
        print(f"  {line}")

    print("\nWithout the loader, read as a trn1, inf2 or trn2 device reads it:")
    plain = load_file(file)
    seen = torch.cat([neuron_view(t).view(-1) for t in plain.values() if t.dtype == torch.float8_e4m3fn])
    print(f"  {int(seen.isinf().sum())} inf and {int(seen.isnan().sum())} nan among {seen.numel()} FP8 weights")
    reference = logits(plain, config, prompt, read=torch.Tensor.float)
    broken = logits(plain, config, prompt, read=neuron_view)
    show("device", broken)

    print("\nWith neuron_fp8_loader.load_state_dict:")
    loaded = neuron_fp8_loader.load_checkpoint(checkpoint)
    ready = logits(loaded.state_dict, config, prompt, read=neuron_view)
    show("device", ready)
    difference = (ready - reference).abs().max().item()
    same = torch.equal(ready.argmax(-1), reference.argmax(-1))
    print(
        f"  largest difference from the GPU's reading: {difference:.1e}, of logits up to {reference.abs().max():.1f}"
    )
    print(f"  same next token at every position: {'yes' if same else 'no'}")
    print(f"\n{loaded.report.summary()}")
    good = not broken.isfinite().all() and ready.isfinite().all() and same and difference < 1e-3
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tiny-llama-fp8"))

"""NxD's obscure errors about scales, said in words.

What an error is about is told by the name that it misses, or by the function that raised it: many say nothing, and a
model's conversion has assertions of its own.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Fp8LoaderError, OptionError

_BFLOAT16 = 'fp8_rescale={{"dequantize": ["{0}"]}} with modules_to_not_convert left out has them as bfloat16'

_QKV_SCALE = re.compile(r"\.self_attn\.[qkv]_proj\.scale$")
_NO_SCALE = re.compile(r"^Cannot find \S+\.scale in ")
_SCALE_SHAPES = {"verify_scale_dimension", "_setup_for_scale"}
"""Functions that hold the shape of a scale against its weight: NxD Inference's ``modules/attention/gqa.py``, at the
load, and NxD's ``quantization/quantization_layers.py``, when the model is built."""


def explanation(error: BaseException) -> str | None:
    """What to set against an error of NxD Inference about quantized layers; None for any other error."""
    text = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    raised_by = frames[-1].name if frames else ""
    if isinstance(error, KeyError):
        name = str(error.args[0]) if error.args else ""
        if not name.endswith((".scale", ".weight_scale", ".weight_scale_inv")):
            return None
        if name.endswith("Wqkv.scale"):
            return (
                f"{name} is not there: with fused_qkv=True this model takes its attention as bfloat16 only, or its "
                f"weights without their scales. {_BFLOAT16.format('*.self_attn.*')}; or set fused_qkv=False"
            )
        if _QKV_SCALE.search(name):
            return (
                f"{name} is not there: with fused_qkv=True, where queries, keys and values are not FP8 (they have a "
                "bias, or are listed), the model takes no part of its attention so. "
                f"{_BFLOAT16.format('*.self_attn.*')}; or set fused_qkv=False"
            )
        return f"{name} is not there: its layer is quantized, its weight is not. {_wrong_list()}"
    if isinstance(error, RuntimeError) and _NO_SCALE.match(text):
        return f"{text}: its layer is quantized, and no scale came for it. {_wrong_list()}"
    if isinstance(error, NotImplementedError) and raised_by == "set_bias_to_state_dict":
        return (
            f"queries, keys and values with a bias cannot be quantized. {_BFLOAT16.format('*.self_attn.[qkv]_proj')}"
        )
    if isinstance(error, AssertionError) and raised_by in _SCALE_SHAPES:
        return (
            f"the layers of this quantization_type do not take these scales ({text or 'no text'}). "
            "Layers with two-dimensional weights (attention, MLP) take "
            'quantization_type="per_channel_symmetric"; "expert_wise_per_channel_symmetric" and '
            '"blockwise_symmetric", with quantization_block_axis=[1, 2], are for fused experts. '
            f"Or {_BFLOAT16.format('*.self_attn.*')}"
        )
    return None


def _wrong_list() -> str:
    return (
        "Leave modules_to_not_convert out to have it filled in from the checkpoint, or name this module there; "
        f"for experts, {_BFLOAT16.format('*.experts.*')}"
    )


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Raise OptionError in the place of NxD's errors that are known; others pass."""
    try:
        yield
    except Fp8LoaderError:
        raise
    except (KeyError, RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        text = explanation(error)
        if text is None:
            raise
        raise OptionError(f"{source}: {text}") from error

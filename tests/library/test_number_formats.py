"""Weights in a narrower format: numbers that do not fit are named, or bounded."""

import pytest
import torch

from library.checkpoints.number_formats import clamping, largest_that_fits, narrowed, narrowed_all, overflow_of
from library.core.errors import CheckpointError

FORMATS = [getattr(torch, name) for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")]


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_limit_is_where_rounding_ends(dtype):
    """The largest number of a format, and all that is rounded to it, pass; the first that is not does not."""
    limit, largest = largest_that_fits(dtype), torch.finfo(dtype).max
    below = torch.tensor(limit, dtype=torch.float64) * (1 - 1e-12)
    assert overflow_of(below.view(1), dtype) is None and overflow_of(-below.view(1), dtype) is None
    assert overflow_of(torch.tensor([limit], dtype=torch.float64), dtype) == limit
    if limit < torch.finfo(torch.float32).max:
        assert float(torch.tensor([limit * (1 - 1e-6)]).to(dtype).float()) == largest


def test_fp16():
    tensor = torch.tensor([1.0, -65519.0, 70000.0, float("inf"), float("nan")])
    with pytest.raises(
        CheckpointError, match=r"net\.weight reaches 70000; float16 holds numbers up to 65504\. .*--clamp_overflow"
    ):
        narrowed("net.weight", tensor, torch.float16)
    with clamping(True):
        bounded = narrowed("net.weight", tensor, torch.float16)
    assert bounded[:3].tolist() == [1.0, -65504.0, 65504.0] and bounded[3] == float("inf") and bounded[4].isnan()
    with pytest.raises(CheckpointError):  # the switch ends with its block
        narrowed("net.weight", tensor, torch.float16)


def test_one_message_for_many_and_what_is_not_narrowed():
    many = {f"layer{number}": (torch.full((2,), 500.0), torch.float8_e4m3fn) for number in range(7)}
    with pytest.raises(
        CheckpointError,
        match="layer0 reaches 500, .* and 2 more tensors do not fit; float8_e4m3fn holds numbers up to 448",
    ):
        narrowed_all(many)
    same = {
        "ids": (torch.arange(3), None),
        "wide": (torch.full((2,), 1e30), torch.bfloat16),
        "empty": (torch.zeros(0), torch.float16),
    }
    assert [tensor.dtype for tensor in narrowed_all(same).values()] == [torch.int64, torch.bfloat16, torch.float16]


def test_a_model_whose_weights_do_not_fit_is_not_loaded_with_infinities(tmp_path):
    """In every part and family: they share the cast of the loaders."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from library.flux_utils import load_flux
    from library.tiny_models import build_tiny

    tiny = build_tiny("flux", tmp_path)
    state = load_file(tiny.flux)
    with safe_open(tiny.flux, framework="pt") as file:
        metadata = file.metadata()
    name = next(key for key in state if key.endswith("img_mlp.0.weight"))
    state[name] = state[name].float()
    state[name][0, 0] = 70000.0
    save_file(state, tiny.flux, metadata)
    with pytest.raises(CheckpointError, match=r"img_mlp\.0\.weight reaches 70000; float16 .*--mixed_precision bf16"):
        load_flux(str(tiny.flux), torch.float16, "cpu")
    with pytest.raises(CheckpointError, match="img_mlp.*float8_e4m3fn"):
        load_flux(str(tiny.flux), torch.float8_e4m3fn, "cpu")
    assert load_flux(str(tiny.flux), torch.bfloat16, "cpu") is not None

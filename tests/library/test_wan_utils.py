"""Files of Wan: real sizes, layouts, 8 bits, and what the denoiser does with times, places and blocks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.kinds import describe_checkpoint
from library.core.errors import CheckpointError
from library.safetensors_utils import save_file_atomic
from library.wan_clip_utils import inspect_vision
from library.wan_models import WanModel, WanParams
from library.wan_text_encoder_utils import inspect_umt5
from library.wan_utils import inspect_wan, load_wan, save_wan
from tests.runs.families import key_table, write_header_only

SMALL = WanParams(
    dim=48, ffn_dim=64, num_heads=2, num_layers=3, in_dim=4, out_dim=4, text_dim=20, freq_dim=32, text_len=8
)


def seeded(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> WanModel:
    torch.manual_seed(1)
    made = WanModel(SMALL)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return made.eval().requires_grad_(False)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return seeded(2, 4, 3, 4, 6), torch.tensor([130.5, 900.0]), seeded(2, 5, 20)


@pytest.mark.parametrize(("table", "dim", "in_dim", "told"), [
    ("wan_t2v_1_3b", 1536, 16, "1.3B text to video"), ("wan_t2v_14b", 5120, 16, "14B text to video"),
    ("wan_i2v_14b", 5120, 36, "14B image to video"), ("wan22_i2v_a14b", 5120, 36, "14B 2.2 image to video"),
])  # fmt: skip
def test_real_sizes(tmp_path, table: str, dim: int, in_dim: int, told: str) -> None:
    """Every key and shape of the released files is that of the module, on the meta device."""
    shapes = key_table(table)
    named = {f"model.diffusion_model.{key}": value for key, value in shapes.items()}
    write_header_only(tmp_path / "model.safetensors", named)
    params = inspect_wan(tmp_path / "model.safetensors").params
    with torch.device("meta"):
        found = {key: list(tensor.shape) for key, tensor in WanModel(params).state_dict().items()}
    assert found == shapes
    assert (params.dim, params.in_dim, params.num_heads, params.head_dim) == (dim, in_dim, dim // 128, 128)
    assert params.axes_dim == (44, 42, 42) and params.has_vision == (table == "wan_i2v_14b")
    assert told in describe_checkpoint(tmp_path / "model.safetensors").detail


def test_real_sizes_of_encoders(tmp_path) -> None:
    for table in ("umt5_xxl_wan", "umt5_xxl_hf"):
        write_header_only(tmp_path / f"{table}.safetensors", key_table(table))
        values = inspect_umt5(tmp_path / f"{table}.safetensors")
        sizes = [values[name] for name in ("d_model", "num_layers", "num_heads", "vocab_size")]
        assert sizes == [4096, 24, 64, 256384]
    write_header_only(tmp_path / "clip.safetensors", key_table("wan_clip_vision_h"))
    values = inspect_vision(tmp_path / "clip.safetensors").values
    assert (values["width"], values["heads"], values["layers"], values["size"]) == (1280, 16, 32, 224)


def test_both_layouts_and_split_files(tmp_path, model, inputs) -> None:
    """One file, two files of a set, and a folder of diffusers load the same model."""
    from library.checkpoints import layout_rules
    from library.checkpoints.wan_convert import denoiser_rules
    from library.wan_utils import LAYOUTS

    expected = model(*inputs)
    save_wan(model, tmp_path / "one.safetensors")
    state = model.state_dict()
    config = {"num_heads": 2, "text_len": 8}
    names = sorted(state)
    for number, part in ((1, names[:20]), (2, names[20:])):
        save_file_atomic({key: state[key] for key in part}, tmp_path / f"two-{number:05d}-of-00002.safetensors")
    folder = tmp_path / "folder" / "transformer"
    folder.mkdir(parents=True)
    theirs = layout_rules.from_original(state, denoiser_rules(state))
    save_file_atomic(theirs, folder / "diffusion_pytorch_model.safetensors")
    assert LAYOUTS.config(model.params)["attention_head_dim"] == 24
    for path in ("one.safetensors", "two-00001-of-00002.safetensors", "folder"):
        loaded = load_wan(tmp_path / path, torch.float32, "cpu", config=config)
        assert torch.equal(loaded(*inputs), expected), path
    assert load_wan(tmp_path / "one.safetensors", None, "cpu").params == SMALL, "what shapes do not tell is written"


def test_eight_bits(tmp_path, model, inputs) -> None:
    """Scaled rows stay near the full weights, in either layout; what the time goes through stays float32."""
    expected = model(*inputs)
    save_wan(model, tmp_path / "one.safetensors", torch.bfloat16)
    scaled = load_wan(tmp_path / "one.safetensors", torch.float32, "cpu", form="fp8_scaled")
    assert scaled.blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    error = (scaled(*inputs) - expected).norm() / expected.norm()
    assert error < 0.05
    small = load_wan(tmp_path / "one.safetensors", torch.float8_e4m3fn, "cpu")
    assert small.time_embedding[0].weight.dtype == small.blocks[1].modulation.dtype == torch.float32
    assert small.dtype == torch.bfloat16 and small.blocks[0].ffn[2].weight.dtype == torch.float8_e4m3fn
    assert torch.isfinite(small(*inputs)).all()


def test_one_embedding_for_each_distinct_time(model, inputs) -> None:
    """Times of tokens give what times of samples give, and only two distinct ones are computed of 36."""
    x, t, text = inputs
    seen = []
    model.time_embedding.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    together = model(x, t, text)
    torch.testing.assert_close(model(x, t[:, None].expand(2, 18), text), together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, t[:, None].expand(2, 3), text), together, rtol=1e-5, atol=1e-5)
    assert seen == [2, 2, 2]


def test_places_of_frames(model, inputs) -> None:
    """0, 1, 2 is the usual order; others, one row for each sample, change the result; so does only their distance."""
    x, t, text = inputs
    usual = model(x, t, text)
    assert torch.equal(model(x, t, text, f_indices=torch.tensor([0, 1, 2])), usual)
    apart = model(x, t, text, f_indices=torch.tensor([[0, 1, 2], [0, 1, 9]]))
    torch.testing.assert_close(apart[0], usual[0], rtol=1e-5, atol=1e-5)
    assert (apart[1] - usual[1]).abs().max() > 1e-3
    torch.testing.assert_close(model(x, t, text, f_indices=torch.tensor([7, 8, 9])), usual, rtol=1e-4, atol=1e-4)


def test_skipped_blocks(model, inputs) -> None:
    """What a model without the middle block gives."""
    skipped = model(*inputs, skip_block_indices=(1,))
    del model.blocks[1]
    assert torch.equal(skipped, model(*inputs))


def test_wrong_inputs_are_told(model, inputs) -> None:
    x, t, text = inputs
    for more, told in (
        ({"y": seeded(2, 2, 3, 4, 6)}, "4 channels, 2 beside them; the model takes 4"),
        ({"f_indices": torch.tensor([0, 1])}, "f_indices has 2 places; the latents have 3 frames"),
    ):
        with pytest.raises(ValueError, match=told):
            model(x, t, text, **more)
    with pytest.raises(ValueError, match="the text has 9 tokens; the model takes 8"):
        model(x, t, seeded(2, 9, 20))
    with pytest.raises(ValueError, match="multiples of the patch"):
        model(x[..., :5], t, text)


def test_relatives_are_refused(tmp_path, model) -> None:
    """A file with the tensors of another method is not cut to what fits."""
    save_file_atomic({**model.state_dict(), "vace_blocks.0.norm3.weight": torch.ones(4)}, tmp_path / "vace.safetensors")
    with pytest.raises(CheckpointError, match="vace_blocks.0.norm3.weight"):
        inspect_wan(tmp_path / "vace.safetensors", {"num_heads": 2, "text_len": 8})


def test_models_are_rewritten_for_diffusers_and_back(tmp_path) -> None:
    from library.tiny_models.wan_tiny import build_tiny_wan
    from tools import convert_model

    diffusers = pytest.importorskip("diffusers")
    tiny = build_tiny_wan(tmp_path / "tiny", task="flf2v-14B")
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert convert_model.main([str(tiny.denoiser), str(folder), "--to", "diffusers"]) == 0
    assert convert_model.main([str(folder), str(back), "--to", "single"]) == 0
    before, after = load_file(tiny.denoiser), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert sum(tensor.numel() for tensor in theirs.parameters()) == sum(tensor.numel() for tensor in before.values())

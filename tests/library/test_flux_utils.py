"""Loading FLUX.1 parts: every layout, prefix and type of file; hyper-parameters from shapes; clear refusals."""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library import flux_utils
from library.checkpoints.loading import build_on_meta
from library.components.text_encoder_utils import inspect_clip_l, inspect_t5xxl
from library.core.errors import CheckpointError
from library.flux_models import AutoEncoder, AutoEncoderParams, Flux, FluxParams
from library.safetensors_utils import load_safetensors, read_header, save_file_atomic
from tests.tiny import build_tiny_flux, random_state

KEY_TABLES = Path(__file__).parents[1] / "golden" / "checkpoints"
PARAMS = FluxParams(
    in_channels=16, vec_in_dim=12, context_in_dim=20, hidden_size=64, num_heads=2, mlp_ratio=3.0, depth=2,
    depth_single_blocks=1, axes_dim=(4, 14, 14), qkv_bias=True,
)  # fmt: skip
AE_PARAMS = AutoEncoderParams(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)


def key_table(name: str) -> dict[str, list[int]]:
    with gzip.open(KEY_TABLES / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def empty_checkpoint(path: Path, shapes: dict[str, list[int]], dtype: str = "BF16", size: int = 2) -> Path:
    """A file with the header of a full-size checkpoint and a hole in place of its data."""
    header, position = {}, 0
    for key, shape in shapes.items():
        end = position + size * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return path


def flux_state(params: FluxParams = PARAMS) -> dict[str, torch.Tensor]:
    return random_state(build_on_meta(lambda: Flux(params)), torch.Generator().manual_seed(1))


def ae_state(params: AutoEncoderParams = AE_PARAMS) -> dict[str, torch.Tensor]:
    return random_state(build_on_meta(lambda: AutoEncoder(params)), torch.Generator().manual_seed(2))


@pytest.fixture
def flux_file(tmp_path: Path):
    def write(
        state: dict[str, torch.Tensor] | None = None,
        metadata: dict[str, str] | None = None,
        name: str = "f.safetensors",
    ) -> Path:
        save_file_atomic(flux_state() if state is None else state, tmp_path / name, metadata)
        return tmp_path / name

    return write


def output_of(model: Flux) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    params = model.params
    with torch.no_grad():
        return model(
            torch.randn(1, 6, params.in_channels, generator=generator), flux_utils.prepare_img_ids(1, 2, 3),
            torch.randn(1, 4, params.context_in_dim, generator=generator), torch.zeros(1, 4, 3), torch.tensor([0.4]),
            torch.randn(1, params.vec_in_dim, generator=generator), torch.ones(1),
        ).float()  # fmt: skip


@pytest.mark.parametrize(("name", "guidance"), [("flux_dev", True), ("flux_schnell", False)])
def test_real_denoiser_is_recognised_and_has_the_real_keys(tmp_path, name: str, guidance: bool) -> None:
    shapes = key_table(name)
    info = flux_utils.inspect_flow_model(empty_checkpoint(tmp_path / "x.safetensors", shapes))
    assert info.params == FluxParams(guidance_embed=guidance)
    assert info.is_schnell is not guidance and info.dtypes == {torch.bfloat16}
    model = build_on_meta(lambda: Flux(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes


def test_real_autoencoder_has_the_real_keys(tmp_path) -> None:
    shapes = key_table("vae_ldm16")
    info = flux_utils.inspect_ae(empty_checkpoint(tmp_path / "x.safetensors", shapes))
    assert info.params == AutoEncoderParams()
    model = build_on_meta(lambda: AutoEncoder(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes


def test_an_autoencoder_that_lacks_a_tensor_is_told_by_its_header(tmp_path) -> None:
    shapes = key_table("vae_ldm16")
    del shapes["decoder.up.2.block.1.norm2.bias"]
    with pytest.raises(CheckpointError, match="1 keys are missing: decoder.up.2.block.1.norm2.bias"):
        flux_utils.inspect_ae(empty_checkpoint(tmp_path / "x.safetensors", shapes))


def test_sizes_of_the_real_text_encoders(tmp_path) -> None:
    clip = inspect_clip_l(empty_checkpoint(tmp_path / "c.safetensors", key_table("clip_l")))
    assert (clip["width"], clip["heads"], clip["layers"], clip["eos"], clip["max_len"]) == (768, 12, 12, 49407, 77)
    t5 = inspect_t5xxl(empty_checkpoint(tmp_path / "t.safetensors", key_table("t5xxl")))
    names = ("d_model", "num_heads", "d_kv", "d_ff", "num_layers", "vocab_size", "buckets")
    assert [t5[name] for name in names] == [4096, 64, 64, 10240, 24, 32128, 32]


@pytest.mark.parametrize("prefix", ["", *flux_utils.DENOISER_PREFIXES])
def test_every_prefix_is_stripped(flux_file, prefix: str) -> None:
    state = {"aaa.first": torch.zeros(1)} if prefix else {}  # the first key of a file says nothing about the others
    state |= {prefix + key: tensor for key, tensor in flux_state().items()}
    model = flux_utils.load_flux(flux_file(state), torch.float32, "cpu")
    assert model.params == PARAMS
    assert all(torch.equal(tensor, flux_state()[key]) for key, tensor in model.state_dict().items())


def test_parts_out_of_one_large_file(flux_file) -> None:
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in flux_state().items()}
    state |= {f"vae.{key}": tensor for key, tensor in ae_state().items()}
    state["text_encoders.t5xxl.transformer.shared.weight"] = torch.zeros(4, 4)
    path = flux_file(state)
    assert flux_utils.load_flux(path, torch.float32, "cpu", disable_mmap=True).params == PARAMS
    assert flux_utils.load_ae(path, torch.float32, "cpu", config={"norm_groups": 4}).params == AE_PARAMS


def test_mixed_prefixes_are_an_error(flux_file) -> None:
    state = {
        ("diffusion_model." if key.startswith("img_in") else "") + key: tensor for key, tensor in flux_state().items()
    }
    with pytest.raises(CheckpointError, match="different prefixes"):
        flux_utils.load_flux(flux_file(state), torch.float32, "cpu")


def test_part_of_a_split_set(flux_file, tmp_path) -> None:
    items = list(flux_state().items())
    for number, part in enumerate((items[:20], items[20:]), 1):
        path = flux_file(dict(part), name=f"m-{number:05d}-of-00002.safetensors")
    assert flux_utils.load_flux(path, torch.float32, "cpu").params == PARAMS
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="m-00001-of-00002"):
        flux_utils.load_flux(path, torch.float32, "cpu")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_types_of_files(flux_file, stored: torch.dtype, wanted: torch.dtype) -> None:
    state = {key: tensor.to(stored) for key, tensor in flux_state().items()}
    model = flux_utils.load_flux(flux_file(state), wanted, "cpu")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {wanted}
    assert torch.equal(model.img_in.weight, state["img_in.weight"].to(wanted))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_kept_in_8_bits_compute_like_widened_ones(flux_file, stored: torch.dtype, autocast: bool) -> None:
    path = flux_file({key: tensor.to(stored) for key, tensor in flux_state().items()})
    model = flux_utils.load_flux(path, torch.float8_e4m3fn, "cpu")
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert {module.weight.dtype for module in linears} == {torch.float8_e4m3fn}
    assert {module.bias.dtype for module in linears} == {torch.bfloat16} == {model.dtype}
    wide = Flux(model.params)
    wide.load_state_dict({key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(output_of(model), output_of(wide.to(torch.bfloat16)))


def test_scaled_8_bit_weights_are_scaled_back(flux_file) -> None:
    state = flux_state()
    expected = {}
    for key in ("double_blocks.0.img_mlp.0.weight", "double_blocks.1.txt_mlp.2.weight", "img_in.weight"):
        stem = key.removesuffix(".weight")
        scale = {"double_blocks.0.img_mlp.0": (1,), "double_blocks.1.txt_mlp.2": (64, 1), "img_in": (64, 4, 1)}[stem]
        state[key] = state[key].to(torch.float8_e4m3fn)
        state[f"{stem}.scale_weight"] = torch.rand(scale) + 0.5
        blocks = state[key].float().unflatten(1, (scale[1] if len(scale) == 3 else 1, -1))
        expected[key] = (
            blocks * state[f"{stem}.scale_weight"].reshape(-1, scale[1] if len(scale) == 3 else 1, 1)
        ).flatten(1)
    state["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    model = flux_utils.load_flux(flux_file(state), torch.float32, "cpu")
    for key, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[key], tensor)


def test_other_8_bit_types_cannot_stay_in_8_bits(flux_file) -> None:
    path = flux_file({key: tensor.to(torch.float8_e5m2) for key, tensor in flux_state().items()})
    with pytest.raises(CheckpointError, match="float8_e5m2"):
        flux_utils.load_flux(path, torch.float8_e4m3fn, "cpu")


def with_shape(key: str, *shape: int) -> dict[str, torch.Tensor]:
    return {**flux_state(), key: torch.zeros(shape)}


def without(key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in flux_state().items() if name != key}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (with_shape("img_in.weight", 64, 96), "Fill"),
        (with_shape("img_in.weight", 64, 32), "Depth or Canny"),
        ({**flux_state(), "distilled_guidance_layer.in_proj.weight": torch.zeros(2, 2)}, "Chroma"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 2)}, "no FLUX.1 denoiser"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2)}, "no FLUX.1 denoiser"),
        (without("txt_in.weight"), "txt_in.weight is missing"),
        (without("single_blocks.0.linear2.bias"), "1 keys are missing: single_blocks.0.linear2.bias"),
        (
            {**flux_state(), "double_blocks.0.img_extra.weight": torch.zeros(1)},
            "unknown: double_blocks.0.img_extra.weight",
        ),
        (with_shape("double_blocks.1.img_mlp.0.bias", 7), r"double_blocks.1.img_mlp.0.bias is \[7\], needed \[192\]"),
        ({}, "no FLUX.1 denoiser"),
    ],
)
def test_files_that_do_not_fit_are_named(flux_file, state: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        flux_utils.load_flux(flux_file(state), torch.float32, "cpu")


@pytest.mark.parametrize("mlp_ratio", [3.3, 1.7, 2.0, 41 / 64])
def test_feed_forward_width_is_the_whole_part_of_the_ratio(flux_file, mlp_ratio: float) -> None:
    params = replace(PARAMS, mlp_ratio=mlp_ratio)
    width = {3.3: 211, 1.7: 108, 2.0: 128, 41 / 64: 41}[mlp_ratio]
    assert params.mlp_hidden == width
    model = flux_utils.load_flux(flux_file(flux_state(params)), None, "cpu", config={"axes_dim": (4, 14, 14)})
    assert model.double_blocks[0].img_mlp[0].out_features == width


@pytest.mark.parametrize("hidden", [48, 60, 84, 96])
def test_feed_forward_width_is_found_again_from_shapes(hidden: int) -> None:
    for width in range(1, 5 * hidden):
        assert (
            replace(
                PARAMS, hidden_size=hidden, num_heads=2, axes_dim=(hidden // 2,), mlp_ratio=width / hidden
            ).mlp_hidden
            == width
        )


def test_rotary_axes_that_shapes_do_not_tell(flux_file) -> None:
    params = replace(PARAMS, num_heads=4, axes_dim=(4, 6, 6))
    path = flux_file(flux_state(params))
    with pytest.raises(CheckpointError, match="axes_dim"):
        flux_utils.load_flux(path, torch.float32, "cpu")
    with pytest.raises(CheckpointError, match="axes_dim"):
        flux_utils.load_flux(path, torch.float32, "cpu", config={"axes_dim": [4, 6, 8]})
    assert flux_utils.load_flux(path, torch.float32, "cpu", config={"axes_dim": [4, 6, 6]}).params == params
    path = flux_file(flux_state(params), {"model_config": json.dumps({"axes_dim": [4, 6, 6], "theta": 256})})
    assert flux_utils.load_flux(path, torch.float32, "cpu").params == replace(params, theta=256)
    assert flux_utils.load_flux(path, torch.float32, "cpu", config={"theta": 64}).params.theta == 64


def test_damaged_model_config_is_named(flux_file) -> None:
    with pytest.raises(CheckpointError, match="model_config"):
        flux_utils.load_flux(flux_file(flux_state(), {"model_config": "{"}), torch.float32, "cpu")


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("axes", [(4, 14, 14), (8, 12, 12)])
def test_saved_model_loads_as_it_was(tmp_path, qkv_bias: bool, axes: tuple[int, ...]) -> None:
    model = Flux(replace(PARAMS, qkv_bias=qkv_bias, axes_dim=axes))
    flux_utils.save_flow_model(model, tmp_path / "m.safetensors", torch.bfloat16, {"modelspec.title": "x"})
    metadata = read_header(tmp_path / "m.safetensors")[1]
    assert ("model_config" in metadata) == (axes == (8, 12, 12)) and metadata["modelspec.title"] == "x"
    again = flux_utils.load_flux(tmp_path / "m.safetensors", None, "cpu")
    assert again.params == model.params
    assert all(
        torch.equal(tensor.to(torch.bfloat16), again.state_dict()[key]) for key, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("prefix", ["", *flux_utils.AE_PREFIXES])
def test_autoencoder_with_prefix_and_flat_attention(tmp_path, prefix: str) -> None:
    state = {
        prefix + key: tensor.flatten(1) if ".attn_1." in key and tensor.ndim == 4 else tensor
        for key, tensor in ae_state().items()
    }
    save_file_atomic(state, tmp_path / "ae.safetensors")
    vae = flux_utils.load_ae(tmp_path / "ae.safetensors", torch.bfloat16, "cpu", config={"norm_groups": 4})
    assert vae.dtype == torch.bfloat16 and vae.params.spatial_stride == 4
    assert torch.equal(vae.encoder.mid.attn_1.q.weight, ae_state()["encoder.mid.attn_1.q.weight"].to(torch.bfloat16))


def test_wrong_autoencoders_are_named(tmp_path) -> None:
    path = tmp_path / "ae.safetensors"
    save_file_atomic({**ae_state(), "quant_conv.weight": torch.zeros(8, 8, 1, 1)}, path)
    with pytest.raises(CheckpointError, match="SD1, SD2 or SDXL"):
        flux_utils.load_ae(path, torch.float32, "cpu")
    save_file_atomic(flux_state(), path)
    with pytest.raises(CheckpointError, match="no FLUX.1 autoencoder"):
        flux_utils.load_ae(path, torch.float32, "cpu")


def test_encoding_of_an_image_depends_on_its_seed_alone(tmp_path) -> None:
    tiny = build_tiny_flux(tmp_path)
    vae = flux_utils.load_ae(tiny.ae, torch.float32, "cpu")
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        together = vae.encode(images, [5, 6, 5])
        alone = vae.encode(images[1:2], [6])
        mean, logvar = vae.encode_moments(images)
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.equal(together[0], vae.encode(images[:1], [7])[0])
    torch.testing.assert_close(vae.unscale(vae.encode(images)), mean)
    noise = (vae.unscale(together) - mean) / (0.5 * logvar).exp()
    torch.testing.assert_close(noise[0], noise[2], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        vae.encode(images, [1, 2])


def test_packing_there_and_back() -> None:
    latents = torch.randn(2, 16, 6, 10)
    packed = flux_utils.pack_latents(latents)
    assert packed.shape == (2, 15, 64)
    assert torch.equal(packed[0, 6, 4:8], latents[0, 1, 2:4, 2:4].flatten())  # token 6 = row 1, column 1; channel 1
    assert torch.equal(flux_utils.unpack_latents(packed, 3, 5), latents)


def test_tiny_set_is_complete_and_the_same_every_time(tmp_path) -> None:
    first, second = (build_tiny_flux(tmp_path / name) for name in "ab")
    for name in ("flux", "ae", "clip_l", "t5xxl"):
        assert getattr(first, name).read_bytes() == getattr(second, name).read_bytes()
    assert flux_utils.load_flux(first.flux, None, "cpu").params == first.params
    assert flux_utils.load_ae(first.ae, None, "cpu").params == first.ae_params
    assert build_tiny_flux(tmp_path / "c", seed=1).flux.read_bytes() != first.flux.read_bytes()
    schnell = build_tiny_flux(tmp_path / "d", guidance=False, hidden=64, dtype=torch.bfloat16)
    assert flux_utils.inspect_flow_model(schnell.flux).is_schnell
    assert {tensor.dtype for tensor in load_safetensors(schnell.clip_l).values()} == {torch.bfloat16}

"""The causal video autoencoder: files, beside diffusers' class, in tiles and by chunks of frames, pictures as clips."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.checkpoints.kinds import check_slot, describe_checkpoint
from library.checkpoints.loading import build_on_meta
from library.components.hunyuan_vae_models import CausalConv3d, CausalVideoVAE, VideoAutoEncoderParams
from library.components.hunyuan_vae_utils import inspect_hunyuan_vae, load_hunyuan_vae
from library.core.errors import CheckpointError
from library.safetensors_utils import save_file_atomic
from tests.library.test_flux_utils import empty_checkpoint, key_table
from tests.library.test_hunyuan_video_utils import relative
from tests.tiny import random_state

PARAMS = VideoAutoEncoderParams(
    block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4
)
CONFIG = {"norm_num_groups": 4}


def new_state(params: VideoAutoEncoderParams = PARAMS) -> dict[str, torch.Tensor]:
    return random_state(build_on_meta(lambda: CausalVideoVAE(params)), torch.Generator().manual_seed(1))


def new_vae(params: VideoAutoEncoderParams = PARAMS) -> CausalVideoVAE:
    vae = CausalVideoVAE(params)
    vae.load_state_dict(new_state(params))
    return vae.requires_grad_(False)


def clip(*size: int) -> torch.Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def comfy_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as ComfyUI saves it."""
    words = (
        ("resnets.0", "block_1"), ("resnets.1", "block_2"), ("attentions.0", "attn_1"), ("mid_block", "mid"),
        ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", ""),
    )  # fmt: skip
    renamed = {}
    for key, tensor in state.items():
        if "mid_block" in key:
            for ours, theirs in words:
                key = key.replace(ours, theirs)
            tensor = tensor[:, :, None, None, None] if tensor.ndim == 2 else tensor
        else:
            key = key.replace("resnets", "block").replace("down_blocks", "down")
            key = key.replace("conv_shortcut", "nin_shortcut").replace("downsamplers.0", "downsample")
            key = key.replace("upsamplers.0", "upsample")
            if "up_blocks" in key:
                half, number, rest = key.partition("up_blocks.")[0], *key.partition("up_blocks.")[2].split(".", 1)
                key = f"{half}up.{3 - int(number)}.{rest}"
        renamed[key.replace("conv_norm_out", "norm_out")] = tensor
    return renamed


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_real_autoencoder_has_the_real_keys(tmp_path: Path) -> None:
    shapes = key_table("vae_hunyuan_video")
    for prefix in ("", "vae."):
        path = empty_checkpoint(tmp_path / "x.safetensors", {prefix + key: shape for key, shape in shapes.items()})
        info = inspect_hunyuan_vae(path)
        assert info.params == VideoAutoEncoderParams()
    model = build_on_meta(lambda: CausalVideoVAE(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes
    with torch.no_grad():
        mean, _ = model.encode_moments(torch.empty(1, 3, 5, 128, 64, device="meta"))
        assert mean.shape == (1, 16, 2, 16, 8) and model.decode(mean).shape == (1, 3, 5, 128, 64)


def test_every_layout_gives_the_same_autoencoder(tmp_path: Path) -> None:
    """Under prefixes, in a PyTorch file, as a folder of diffusers, and under the names inside of ComfyUI."""
    diffusers = pytest.importorskip("diffusers")
    state = new_state()
    expected = new_vae().decode(torch.ones(1, 4, 2, 2, 2))
    save_file_atomic({f"vae.{key}": tensor for key, tensor in state.items()}, tmp_path / "vae.safetensors")
    torch.save({"state_dict": {f"vae.{key}": tensor for key, tensor in state.items()}}, tmp_path / "pytorch_model.pt")
    save_file_atomic(comfy_names(state), tmp_path / "comfy.safetensors")
    theirs = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=PARAMS.block_out_channels, layers_per_block=1, latent_channels=4, norm_num_groups=4
    )
    theirs.load_state_dict(state)
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    for name in ("vae.safetensors", "pytorch_model.pt", "comfy.safetensors", "pipeline", "pipeline/vae"):
        config = None if name.startswith("pipeline") else CONFIG
        vae = load_hunyuan_vae(tmp_path / name, torch.float32, "cpu", config=config)
        assert vae.params == PARAMS and torch.equal(vae.decode(torch.ones(1, 4, 2, 2, 2)), expected), name
        assert check_slot(tmp_path / name, "vae", {"vae_hunyuan_video"}, with_pickles=True) is None, name
    assert describe_checkpoint(tmp_path / "comfy.safetensors").layout == "ComfyUI"
    config = json.loads((tmp_path / "pipeline" / "vae" / "config.json").read_text())
    assert config["scaling_factor"] == PARAMS.scaling_factor


@pytest.mark.parametrize(("change", "message"), [
    ({"quant_conv.weight": None}, "holds no causal video autoencoder"),
    ({"encoder.conv_out.conv.bias": None}, "1 keys are missing: encoder.conv_out.conv.bias"),
    ({"encoder.more": torch.zeros(1)}, "1 keys are unknown: encoder.more"),
])  # fmt: skip
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {key: tensor for key, tensor in {**new_state(), **change}.items() if tensor is not None}
    save_file_atomic(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_hunyuan_vae(tmp_path / "x.safetensors", torch.float32, "cpu", config=CONFIG)


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "attention"), [(9, True), (1, True), (5, False)])
def test_it_computes_what_diffusers_does(frames: int, attention: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    params = replace(PARAMS, mid_block_add_attention=attention, layers_per_block=2)
    theirs = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=params.block_out_channels, layers_per_block=2, latent_channels=4, norm_num_groups=4,
        mid_block_add_attention=attention,
    ).eval()  # fmt: skip
    ours = new_vae(params)
    theirs.load_state_dict(ours.state_dict())
    images = clip(frames, 24, 40)
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, logvar = ours.encode_moments(images)
        assert relative(mean, posterior.mean) < 1e-5 and relative(logvar, posterior.logvar) < 1e-5
        assert relative(ours.decode(ours.scale(mean)), theirs.decode(mean).sample) < 1e-5


def test_tiles_are_those_of_diffusers_where_both_have_them() -> None:
    """Two tiles in a row; diffusers begins a third one behind them, of latents that the second has already. What is no
    larger than a tile is what it is without."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=PARAMS.block_out_channels, layers_per_block=1, latent_channels=4, norm_num_groups=4
    ).eval()  # fmt: skip
    ours = new_vae()
    theirs.load_state_dict(ours.state_dict())
    latents = torch.randn(1, 4, 2, 3, 14, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, small = ours.decode(latents), ours.decode(latents[..., :8])
        ours.set_tile_size(64)
        theirs.enable_tiling(64, 64, 16, 48, 48, 12)
        tiled = ours.decode(latents)
        expected = theirs.decode(latents / PARAMS.scaling_factor).sample
        assert relative(tiled[..., : 12 * 8], expected[..., : 12 * 8]) < 1e-5
        assert 1e-4 < relative(tiled, whole) and torch.equal(ours.decode(latents[..., :8]), small)
        images = clip(5, 24, 14 * 8)
        mean, _ = ours.encode_moments(images)
        assert relative(mean[..., :12], theirs.encode(images).latent_dist.mean[..., :12]) < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 99])
def test_chunks_of_frames_lose_nothing(frames: int) -> None:
    """Over all sizes of chunks, with and without a stride in time, and for a kernel of one place; in float64, where
    sums in another order differ by nothing that counts."""
    vae, images = new_vae().double(), clip(17, 16, 16)
    with torch.no_grad():
        mean, logvar = vae.encode_moments(images)
        decoded = vae.decode(mean)
        vae.set_chunk_frames(frames)
        again = vae.encode_moments(images)
        assert relative(again[0], mean) < 1e-12 and relative(again[1], logvar) < 1e-12
        assert relative(vae.decode(mean), decoded) < 1e-12


def test_a_chunk_is_what_limits_a_convolution(monkeypatch) -> None:
    seen = []
    convolution = CausalConv3d(3, 4, stride=(2, 2, 2))
    forward = convolution.conv.forward
    monkeypatch.setattr(convolution.conv, "forward", lambda x: seen.append(x.shape[2]) or forward(x))
    convolution.chunk_frames = 2
    assert convolution(clip(9, 4, 4)).shape == (1, 4, 5, 2, 2) and seen == [5, 5, 3]


def test_a_frame_never_depends_on_later_ones_but_through_norms() -> None:
    """Attention and convolutions look back alone; group norms are taken over the whole clip."""
    attention = new_vae().encoder.mid_block.attentions[0]
    attention.group_norm = torch.nn.Identity()
    x = torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[:, :, 2] += 1
    with torch.no_grad():
        first, second = attention(x), attention(other)
    assert torch.equal(first[:, :, :2], second[:, :, :2]) and not torch.equal(first[:, :, 2], second[:, :, 2])


def test_a_picture_is_a_clip_of_one_frame() -> None:
    vae, images = new_vae(), clip(1, 24, 16)
    with torch.no_grad():
        latents = vae.encode_raw(images, seeds=[7])
        assert torch.equal(vae.encode_raw(images[:, :, 0], seeds=[7]), latents[:, :, 0])
        assert torch.equal(vae.decode(latents[:, :, 0]), vae.decode(latents)[:, :, 0])
        assert torch.equal(vae.encode(images, [7]), latents * PARAMS.scaling_factor)
    with pytest.raises(ValueError, match="the clip has 6 frames; 1 \\+ a multiple of 4 is needed, e.g. 5"):
        vae.encode_moments(clip(6, 16, 16))

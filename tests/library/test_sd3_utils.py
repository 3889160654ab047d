"""Files of SD3: real key tables, parts of a whole file, refusals."""

from __future__ import annotations

import pytest
import torch

from library import sd3_utils
from library.checkpoints.kinds import describe_checkpoint
from library.checkpoints.loading import build_on_meta
from library.components.text_encoder_utils import CLIP_G, CLIP_L, inspect_clip
from library.core.errors import CheckpointError
from library.sd3_models import MMDiT, SD3Params
from tests.library.test_flux_utils import empty_checkpoint, key_table

REAL = {
    "sd3_medium": ("medium", SD3Params()),
    "sd35_medium": (
        "5-medium",
        SD3Params(qk_norm="rms", x_block_self_attn_layers=tuple(range(13)), pos_embed_max_size=384),
    ),
    "sd35_large": ("5-large", SD3Params(depth=38, hidden_size=2432, num_heads=38, qk_norm="rms")),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_denoiser_is_recognised_and_has_the_real_keys(tmp_path, name: str) -> None:
    shapes, (version, params) = key_table(name), REAL[name]
    info = sd3_utils.inspect_sd3(empty_checkpoint(tmp_path / "x.safetensors", shapes))
    assert (info.version, info.params, info.is_diffusers) == (version, params, False)
    model = build_on_meta(lambda: MMDiT(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize("name", REAL)
def test_the_layout_of_diffusers_at_real_size(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    params = REAL[name][1]
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=params.depth,
            num_attention_heads=params.num_heads,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=params.hidden_size,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=params.pos_embed_max_size,
            dual_attention_layers=params.x_block_self_attn_layers,
            qk_norm=params.qk_norm and "rms_norm",
        )
        ours = MMDiT(params)
    converted = sd3_utils.convert_sd3_to_diffusers(ours.state_dict())
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }


def test_the_parts_of_a_real_whole_file(tmp_path) -> None:
    path = empty_checkpoint(tmp_path / "sd3.safetensors", key_table("sd3_medium_checkpoint"))
    assert sd3_utils.inspect_sd3(path).params == SD3Params()
    assert sd3_utils.parts_in(path) == ("clip_l", "clip_g", "t5xxl", "vae")
    assert sd3_utils.inspect_vae_sd3(path).params.scaling_factor == 1.5305
    clips = [inspect_clip(path, slot).values for slot in (CLIP_L, CLIP_G)]
    assert [(values["width"], values["layers"], values["projection"]) for values in clips] == [
        (768, 12, 768),
        (1280, 32, 1280),
    ]
    assert sd3_utils.inspect_encoder("t5xxl", path)["d_model"] == 4096
    assert describe_checkpoint(path).kind == "sd3"


def test_a_file_without_other_parts(tmp_path) -> None:
    path = empty_checkpoint(tmp_path / "sd3.safetensors", key_table("sd35_medium"))
    assert sd3_utils.parts_in(path) == ()


def test_other_models_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="holds no SD3 denoiser"):
        sd3_utils.inspect_sd3(empty_checkpoint(tmp_path / "x.safetensors", key_table("flux_dev")))
    with pytest.raises(CheckpointError, match="no multiple|num_heads"):
        shapes = {key: shape for key, shape in key_table("sd3_medium").items() if key != "final_layer.linear.weight"}
        sd3_utils.inspect_sd3(
            empty_checkpoint(
                tmp_path / "y.safetensors",
                {**shapes, "final_layer.linear.weight": [64, 1536], "x_embedder.proj.weight": [100, 16, 2, 2]},
            )
        )

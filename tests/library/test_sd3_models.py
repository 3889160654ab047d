"""The MMDiT: against the class of diffusers, sizes and positions, times per patch, checkpoints, full steps."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from library import sd3_utils
from library.checkpoints.sd3_convert import convert_diffusers_to_sd3, convert_sd3_to_diffusers
from library.core.errors import ConfigError
from library.sd3_models import MMDiT, SD3Params, get_2d_sincos_pos_embed, sample_side
from tests.tiny import random_state

VARIANTS = {"medium": (None, ()), "5-medium": ("rms", (0, 1)), "5-large": ("rms", ())}


def params_of(variant: str, **settings: object) -> SD3Params:
    norm, second = VARIANTS[variant]
    sizes = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "pos_embed_max_size": 12,
        "adm_in_channels": 20,
        "context_in": 24,
    }
    return SD3Params(**{**sizes, "qk_norm": norm, "x_block_self_attn_layers": second, **settings})


def model_of(variant: str = "5-medium", **settings: object) -> MMDiT:
    model = MMDiT(params_of(variant, **settings))
    model.load_state_dict(random_state(model, torch.Generator().manual_seed(1)))
    return model.eval()


def inputs(height: int = 6, width: int = 10, batch: int = 2, tokens: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(batch, 16, height, width, generator=generator),
        "t": torch.tensor([130.0, 920.0])[:batch],
        "y": torch.randn(batch, 20, generator=generator),
        "context": torch.randn(batch, tokens, 24, generator=generator),
    }


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


# -- against diffusers -------------------------------------------------------------------------------------------------


def diffusers_transformer(variant: str) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    params = params_of(variant, mlp_ratio=4.0)
    torch.manual_seed(3)
    model = diffusers.SD3Transformer2DModel(
        sample_size=24,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=16,
        pos_embed_max_size=12,
        dual_attention_layers=params.x_block_self_attn_layers,
        qk_norm=params.qk_norm and "rms_norm",
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(
            parameter, mean=float("norm_" in name and "weight" in name and "linear" not in name), std=0.15
        )
    return model.eval()


@torch.no_grad()
def output_of(reference: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return reference(
        hidden_states=given["x"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["y"],
        timestep=given["t"],
        return_dict=False,
    )[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_diffusers_folder_gives_the_same_output(tmp_path, variant: str) -> None:
    reference = diffusers_transformer(variant)
    reference.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    info = sd3_utils.inspect_sd3(tmp_path)
    assert (info.is_diffusers, info.version, info.params.num_heads) == (True, variant, 2)
    model = sd3_utils.load_sd3(tmp_path, torch.float32, "cpu")
    for size in ((6, 10), (24, 2)):
        given = inputs(*size)
        with torch.no_grad():
            assert relative(model(**given), output_of(reference, given)) < 1e-5, size


def test_a_single_file_in_diffusers_names(tmp_path) -> None:
    reference = diffusers_transformer("5-large")
    save_file(
        {f"model.diffusion_model.{key}": tensor for key, tensor in reference.state_dict().items()},
        tmp_path / "m.safetensors",
    )
    model = sd3_utils.load_sd3(tmp_path / "m.safetensors", torch.float32, "cpu")
    with torch.no_grad():
        assert relative(model(**inputs()), output_of(reference, inputs())) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_weights_in_their_class_and_conversion_is_exact(variant: str) -> None:
    model, reference = model_of(variant), diffusers_transformer(variant)
    names = convert_sd3_to_diffusers(model.state_dict())
    reference.load_state_dict(names, strict=True)
    with torch.no_grad():
        assert relative(output_of(reference, inputs()), model(**inputs())) < 1e-5
    again = convert_diffusers_to_sd3(names)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())


def test_the_table_of_an_untrained_model_is_that_of_diffusers() -> None:
    positions = pytest.importorskip("diffusers.models.embeddings").get_2d_sincos_pos_embed(
        32, 12, base_size=12, output_type="pt"
    )
    torch.testing.assert_close(get_2d_sincos_pos_embed(32, 12), positions.float(), rtol=1e-5, atol=1e-5)


# -- sizes and positions -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_odd_sides_are_mirrored_and_cut_off() -> None:
    model, given = model_of(), inputs(5, 7)
    result = model(**given)
    whole = model(**{**given, "x": torch.nn.functional.pad(given["x"], (0, 1, 0, 1), mode="reflect")})
    assert result.shape == (2, 16, 5, 7) and torch.equal(result, whole[:, :, :5, :7])


@torch.no_grad()
def test_a_single_row_or_column_is_repeated() -> None:
    model = model_of()
    for height, width in ((1, 1), (1, 7), (5, 1)):
        given = inputs(height, width)
        whole = {**given, "x": given["x"].repeat(1, 1, 2 if height == 1 else 1, 2 if width == 1 else 1)}
        expected = model(**whole)[:, :, :height, :width]
        assert torch.equal(model(**given), expected), (height, width)


@torch.no_grad()
def test_a_crop_of_the_table_of_each_sample() -> None:
    model, given = model_of(), inputs()
    middle = torch.tensor([[(12 - 3) // 2, (12 - 5) // 2]] * 2)
    assert torch.equal(model(**given, crop_corners=middle), model(**given))
    assert model.crop_range((3, 5)) == (9, 7)
    corners = torch.tensor([[9, 7], [0, 3]])
    both = model(**given, crop_corners=corners)
    for row in range(2):
        alone = model(
            **{name: tensor[row : row + 1] for name, tensor in given.items()}, crop_corners=corners[row : row + 1]
        )
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both, model(**given))


def test_a_picture_beyond_the_table_is_refused_and_the_scaled_table_takes_it() -> None:
    model = model_of()
    with pytest.raises(ConfigError, match=r"13 x 2 patches; .* 12 x 12 .*--enable_scaled_pos_embed"):
        model(**inputs(26, 4))
    model.enable_scaled_pos_embed()
    with torch.no_grad():
        assert model(**inputs(26, 4)).shape == (2, 16, 26, 4)
    assert model.crop_range((8, 8)) == (4, 4)  # 1.5 times the side of a square of this area


@pytest.mark.parametrize(
    ("pixels", "side"), [((1024, 1024), 64), ((832, 1216), 64), ((1536, 640), 64), ((832, 256), 32), ((768, 768), 48)]
)
def test_buckets_of_one_resolution_take_one_scaled_table(pixels: tuple[int, int], side: int) -> None:
    assert sample_side((pixels[1] // 16, pixels[0] // 16)) == side


@torch.no_grad()
def test_a_time_for_every_patch() -> None:
    model, given = model_of(), inputs()
    alike = {**given, "t": given["t"][:, None].expand(-1, 15)}
    torch.testing.assert_close(model(**alike), model(**given), rtol=1e-4, atol=1e-5)
    uneven = alike["t"].clone()
    uneven[:, 0] = 3.0
    assert not torch.allclose(model(**{**given, "t": uneven}), model(**given), atol=1e-3)
    velocity, features = model(**given, feature_layer=1)
    assert torch.equal(velocity, model(**given)) and features.shape == (2, 15, model.feature_width)


# -- memory ------------------------------------------------------------------------------------------------------------


def gradients(model: MMDiT) -> list[torch.Tensor]:
    model.requires_grad_(True)
    model.zero_grad()
    model(**inputs()).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_gradient_checkpointing_changes_nothing(cpu_offload: bool) -> None:
    model = model_of().train()
    plain = gradients(model)
    model.enable_gradient_checkpointing(cpu_offload)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(model)))


def test_block_swap_leaves_two_blocks() -> None:
    model = model_of()
    expected = model(**inputs())
    with pytest.raises(ValueError, match="at most 1"):
        model.enable_block_swap(2, torch.device("cpu"))
    model.enable_block_swap(1, torch.device("cpu"))
    model.move_to_device_except_swap_blocks(torch.device("cpu"))
    assert torch.equal(model(**inputs()), expected)


# -- files -------------------------------------------------------------------------------------------------------------


def test_half_precision_is_close_and_the_table_stays_float32(tmp_path) -> None:
    model = model_of()
    sd3_utils.save_sd3(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        expected = model(**inputs())
        for dtype, bound in ((torch.bfloat16, 0.05), (torch.float8_e4m3fn, 0.3)):
            loaded = sd3_utils.load_sd3(tmp_path / "m.safetensors", dtype, "cpu")
            assert loaded.pos_embed.dtype == torch.float32 and loaded.dtype == torch.bfloat16
            assert loaded.joint_blocks[0].x_block.attn.qkv.weight.dtype == dtype
            result = loaded(**inputs())
            assert result.dtype == torch.bfloat16 and relative(result.float(), expected) < bound, dtype


def test_saving_and_loading_is_exact_and_a_missing_table_is_made(tmp_path) -> None:
    model = model_of("medium", pos_embed_max_size=192)
    model.pos_embed.copy_(get_2d_sincos_pos_embed(32, 192)[None])
    sd3_utils.save_sd3(model, tmp_path / "m.safetensors", metadata={"x": "y"})
    loaded = sd3_utils.load_sd3(tmp_path / "m.safetensors", None, "cpu")
    assert loaded.params == model.params  # two heads of 16: no shape tells them
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    state = {key: tensor for key, tensor in copy.copy(model.state_dict()).items() if key != "pos_embed"}
    save_file(state, tmp_path / "n.safetensors")
    bare = sd3_utils.load_sd3(tmp_path / "n.safetensors", torch.float32, "cpu", config={"num_heads": 2})
    assert torch.equal(bare.pos_embed, model.pos_embed)

"""HunyuanImage 2.1: files and their sizes, the denoiser on ragged and empty captions, memory savers, the autoencoder by
rows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from library import hunyuan_image_utils
from library.checkpoints.hunyuan_image_convert import NAMES
from library.checkpoints.kinds import check_slot, describe_checkpoint
from library.checkpoints.loading import build_on_meta
from library.components.hunyuan_stream_utils import DENOISER_PREFIXES
from library.components.ldm_models import AutoEncoderParams
from library.components.llm_encoder_utils import inspect_qwen25_vl
from library.components.text_encoder_utils import inspect_t5xxl
from library.core.errors import CheckpointError
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.hunyuan_image_vae import PARAMS as VAE_PARAMS
from library.hunyuan_image_vae import HunyuanVAE2D
from library.safetensors_utils import load_safetensors, read_header, save_file_atomic
from tests.library.test_flux_utils import empty_checkpoint, key_table
from tests.tiny import random_state

PARAMS = HYImageParams(
    in_channels=8, hidden_size=64, num_heads=2, depth=2, depth_single=3, refiner_depth=1, mlp_ratio=2.0, text_dim=20,
    byt5_dim=12, byt5_mid=16,
    rope_dim_list=(16, 16),
)  # fmt: skip
VAE = AutoEncoderParams(
    ch=8,
    ch_mult=(1, 1, 2, 2, 4, 4),
    num_res_blocks=1,
    z_channels=16,
    norm_groups=4,
    scaling_factor=0.75289,
    shift_factor=0.0,
)


def new_state(params: HYImageParams = PARAMS) -> dict[str, torch.Tensor]:
    return random_state(build_on_meta(lambda: HYImageDiffusionTransformer(params)), torch.Generator().manual_seed(1))


def new_model(params: HYImageParams = PARAMS) -> HYImageDiffusionTransformer:
    model = HYImageDiffusionTransformer(params)
    model.load_state_dict(new_state(params))
    return model.requires_grad_(False)


def inputs(num_text: int = 5, num_glyphs: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 8, 3, 5, generator=generator), "timestep": torch.tensor([130.0, 870.5]),
        "text_states": torch.randn(2, num_text, 20, generator=generator),
        "encoder_attention_mask": torch.ones(2, num_text, dtype=torch.int64),
        "byt5_text_states": torch.randn(2, num_glyphs, 12, generator=generator),
        "byt5_text_mask": torch.ones(2, num_glyphs, dtype=torch.int64),
    }  # fmt: skip


def run(model: HYImageDiffusionTransformer, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(**given)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_real_denoiser_is_recognised_and_has_the_real_keys(tmp_path: Path, prefix: str) -> None:
    shapes = key_table("hunyuan_image")
    info = hunyuan_image_utils.inspect_hunyuan_image(
        empty_checkpoint(tmp_path / "x.safetensors", {prefix + key: shape for key, shape in shapes.items()})
    )
    assert info.params == HYImageParams() and info.dtypes == {torch.bfloat16}
    model = build_on_meta(lambda: HYImageDiffusionTransformer(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes


def test_the_real_autoencoder_has_the_real_keys(tmp_path: Path) -> None:
    shapes = key_table("vae_hunyuan_image")
    info = hunyuan_image_utils.inspect_vae(empty_checkpoint(tmp_path / "x.safetensors", shapes))
    assert info.params == VAE_PARAMS and info.params.spatial_stride == 32
    model = build_on_meta(lambda: HunyuanVAE2D(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes


def test_sizes_of_the_real_text_encoders(tmp_path: Path) -> None:
    qwen = inspect_qwen25_vl(empty_checkpoint(tmp_path / "q.safetensors", key_table("qwen25_vl_7b")))
    assert qwen == {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4, "head_dim": 128, "rope_theta": 1e6, "eps": 1e-6,
    }  # fmt: skip
    byt5 = inspect_t5xxl(empty_checkpoint(tmp_path / "b.safetensors", key_table("byt5_glyph")))
    names = ("d_model", "num_heads", "d_kv", "d_ff", "num_layers", "vocab_size", "buckets")
    assert [byt5[name] for name in names] == [1472, 6, 64, 3584, 12, 1510, 32]


@pytest.mark.parametrize("distilled", [{}, {"guidance_embed": True}, {"guidance_embed": True, "mean_flow": True}])
@pytest.mark.parametrize("prefix", ["", *DENOISER_PREFIXES])
def test_a_denoiser_under_every_prefix(tmp_path: Path, prefix: str, distilled: dict[str, bool]) -> None:
    params = replace(PARAMS, **distilled)
    save_file_atomic({prefix + key: tensor for key, tensor in new_state(params).items()}, tmp_path / "x.safetensors")
    model = hunyuan_image_utils.load_hunyuan_image(tmp_path / "x.safetensors", torch.float32, "cpu")
    assert model.params == params and not any(parameter.requires_grad for parameter in model.parameters())
    given = inputs() | ({"guidance": torch.tensor([3500.0, 1000.0])} if distilled else {})
    assert torch.equal(run(model, **given), run(new_model(params), **given))


def test_a_saved_denoiser_is_read_again_with_what_its_shapes_do_not_tell(tmp_path: Path) -> None:
    model = new_model(replace(PARAMS, rope_theta=300, rope_dim_list=(8, 24)))
    hunyuan_image_utils.save_hunyuan_image(model, tmp_path / "x.safetensors", torch.float32, {"title": "t"})
    again = hunyuan_image_utils.load_hunyuan_image(tmp_path / "x.safetensors", None, "cpu")
    assert asdict(again.params) == asdict(model.params) and read_header(tmp_path / "x.safetensors")[1]["title"] == "t"
    assert torch.equal(run(again, **inputs()), run(model, **inputs()))
    hunyuan_image_utils.save_hunyuan_image(new_model(), tmp_path / "y.safetensors")
    assert "model_config" not in read_header(tmp_path / "y.safetensors")[1]


def test_eight_bits_plain_and_scaled(tmp_path: Path) -> None:
    """Scaled 8 bits are closer; norms, embedders and biases stay as they are; scales of a file are multiplied in."""
    state = new_state()
    state["double_blocks.0.img_mlp.fc1.weight"] *= 1e-3  # rows that plain 8 bits round to nothing
    save_file_atomic(state, tmp_path / "x.safetensors")
    exact = run(hunyuan_image_utils.load_hunyuan_image(tmp_path / "x.safetensors", torch.float32, "cpu"), **inputs())
    plain = hunyuan_image_utils.load_hunyuan_image(tmp_path / "x.safetensors", torch.float8_e4m3fn, "cpu")
    scaled = hunyuan_image_utils.load_hunyuan_image(tmp_path / "x.safetensors", torch.float32, "cpu", form="fp8_scaled")
    for model, inside in ((plain, {torch.bfloat16}), (scaled, {torch.float32})):
        assert (
            model.double_blocks[0].img_attn_qkv.weight.dtype
            == model.single_blocks[0].linear2.weight.dtype
            == torch.float8_e4m3fn
        )
        assert {
            model.double_blocks[0].img_attn_q_norm.weight.dtype,
            model.single_blocks[0].linear1.bias.dtype,
        } == inside
    assert scaled.txt_in.input_embedder.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        far = (run(plain, **inputs()).float() - exact).norm()
    near = (run(scaled, **inputs()) - exact).norm()
    assert near < 0.5 * far and near / exact.norm() < 0.05

    weight = state["single_blocks.0.linear1.weight"]
    state["single_blocks.0.linear1.weight"] = (weight / 0.25).to(torch.float8_e4m3fn)
    state |= {
        "single_blocks.0.linear1.scale_weight": torch.tensor([0.25]),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_file_atomic(
        {f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}, tmp_path / "comfy.safetensors"
    )
    loaded = hunyuan_image_utils.load_hunyuan_image(tmp_path / "comfy.safetensors", torch.float32, "cpu")
    assert (loaded.single_blocks[0].linear1.weight - weight).abs().max() < 0.07 * weight.abs().max()


def test_both_layouts_whole_in_shards_and_in_8_bits(tmp_path: Path) -> None:
    """The layout of diffusers gives the same model, bit by bit; so do the parts of a split set by their index."""
    params = replace(PARAMS, guidance_embed=True, mean_flow=True, rope_theta=300, rope_dim_list=(8, 24))
    state = new_state(params)
    given = inputs() | {"guidance": torch.tensor([3500.0, 1000.0])}
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    other, places = NAMES.to_diffusers(state), {}
    for number, keys in enumerate((list(other)[::2], list(other)[1::2]), 1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file_atomic({key: other[key] for key in keys}, folder / name)
        places |= dict.fromkeys(keys, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(hunyuan_image_utils.LAYOUTS.config(params)))
    save_file_atomic(state, tmp_path / "x.safetensors", {"model_config": json.dumps(asdict(params))})
    told = {"rope_theta": 300, "rope_dim_list": (8, 24)}  # no shape tells it, and one of the parts has no config.json
    for path, config in ((tmp_path / "pipeline", None), (folder, None), (folder / name, told)):
        for how in ({}, {"form": "fp8_scaled"}):
            model = hunyuan_image_utils.load_hunyuan_image(path, torch.float32, "cpu", config=config, **how)
            expected = hunyuan_image_utils.load_hunyuan_image(tmp_path / "x.safetensors", torch.float32, "cpu", **how)
            assert model.params == params and torch.equal(run(model, **given), run(expected, **given))
    assert hunyuan_image_utils.denoiser_state(other).keys() == state.keys()


def test_the_real_autoencoder_in_the_layout_of_diffusers(tmp_path: Path) -> None:
    """Its class makes the names and shapes of the real file, and its folder is that model."""
    from diffusers import AutoencoderKLHunyuanImage

    from library.checkpoints.hunyuan_image_convert import autoencoder_to_original

    config = hunyuan_image_utils.VAE_LAYOUTS.config(VAE_PARAMS)
    vae = build_on_meta(lambda: AutoencoderKLHunyuanImage.from_config(config))
    shapes = {key: list(tensor.shape) for key, tensor in vae.state_dict().items()}
    renamed = autoencoder_to_original(vae.state_dict())
    assert {key: list(tensor.shape) for key, tensor in renamed.items()} == key_table("vae_hunyuan_image")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    empty_checkpoint(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", shapes)
    assert check_slot(tmp_path, "vae", {"vae_hunyuan_image"}) is None
    for path in (tmp_path, tmp_path / "vae", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
        info = hunyuan_image_utils.inspect_vae(path)
        assert info.params == VAE_PARAMS and info.is_diffusers


def comfy_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as ComfyUI saves it: its blocks are those of FLUX.1, its embedders too."""
    words = (
        ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"), ("c_embedder.linear_2", "c_embedder.out_layer"),
        ("t_embedder.mlp.0", "t_embedder.in_layer"), ("t_embedder.mlp.2", "t_embedder.out_layer"),
        ("_in.mlp.0", "_in.in_layer"), ("_in.mlp.2", "_in.out_layer"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"),
        ("_mod.linear", "_mod.lin"), ("modulation.linear", "modulation.lin"), ("attn_qkv", "attn.qkv"),
        ("attn_proj", "attn.proj"), ("attn_q_norm.weight", "attn.norm.query_norm.scale"),
        ("attn_k_norm.weight", "attn.norm.key_norm.scale"), (".q_norm.weight", ".norm.query_norm.scale"),
        (".k_norm.weight", ".norm.key_norm.scale"),
    )  # fmt: skip
    renamed = {}
    for key, tensor in state.items():
        for ours, theirs in words:
            key = key.replace(ours, theirs)
        renamed[key] = tensor
    return renamed


def test_the_names_inside_of_comfy_ui(tmp_path: Path) -> None:
    """The same model, bit by bit, also in 8 bits with and without scales, recognised by its own names."""
    flux = {key for key in key_table("flux_dev") if re.match(r"(double|single)_blocks\.0\.", key)}
    params = replace(PARAMS, guidance_embed=True, mean_flow=True)
    state = new_state(params)
    theirs = comfy_names(state)
    assert {key for key in theirs if re.match(r"(double|single)_blocks\.0\.", key)} == flux
    save_file_atomic(state, tmp_path / "x.safetensors")
    for prefix in ("model.model.", ""):
        save_file_atomic({prefix + key: tensor for key, tensor in theirs.items()}, tmp_path / "comfy.safetensors")
        found = describe_checkpoint(tmp_path / "comfy.safetensors")
        assert (found.kind, found.layout) == ("hunyuan_image", "ComfyUI") and "guidance and mean flow" in found.detail
        given = inputs() | {"guidance": torch.tensor([3500.0, 1000.0])}
        for dtype, how in ((torch.float32, {}), (torch.float32, {"form": "fp8_scaled"}), (torch.float8_e4m3fn, {})):
            mine, other = (
                hunyuan_image_utils.load_hunyuan_image(tmp_path / f"{name}.safetensors", dtype, "cpu", **how)
                for name in ("x", "comfy")
            )
            assert mine.params == other.params == params
            assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in mine.state_dict().items())
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                assert torch.equal(run(mine, **given), run(other, **given))
    assert hunyuan_image_utils.denoiser_state(theirs).keys() == state.keys()
    del theirs["double_blocks.1.txt_attn.proj.weight"]
    save_file_atomic(theirs, tmp_path / "comfy.safetensors")
    with pytest.raises(CheckpointError, match=r"1 keys are missing: double_blocks\.1\.txt_attn_proj\.weight"):
        hunyuan_image_utils.load_hunyuan_image(tmp_path / "comfy.safetensors", torch.float32, "cpu")


@pytest.mark.parametrize(("change", "message"), [
    ({"byt5_in.fc1.weight": None}, "holds no HunyuanImage 2.1 denoiser"),
    ({"time_in.mlp.2.bias": None}, "1 keys are missing: time_in.mlp.2.bias"),
    ({"vision_in.proj.weight": torch.zeros(1)}, "1 keys are unknown: vision_in.proj.weight"),
    ({"img_in.proj.weight": torch.zeros(64)}, "too few dimensions"),
    ({"final_layer.linear.bias": torch.zeros(3)}, "shapes do not fit"),
])  # fmt: skip
def test_a_file_that_does_not_fit(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {key: tensor for key, tensor in {**new_state(), **change}.items() if tensor is not None}
    save_file_atomic(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        hunyuan_image_utils.load_hunyuan_image(tmp_path / "x.safetensors", torch.float32, "cpu")


def test_another_autoencoder_is_told_apart(tmp_path: Path) -> None:
    from library.components.ldm_models import AutoEncoder

    ldm = replace(VAE, ch_mult=(1, 1, 2, 2))
    save_file_atomic(random_state(AutoEncoder(ldm), torch.Generator().manual_seed(1)), tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match="no HunyuanImage 2.1 autoencoder .it lacks decoder.up.0.upsample.conv"):
        hunyuan_image_utils.inspect_vae(tmp_path / "ae.safetensors", {"norm_groups": VAE.norm_groups})


# -- the denoiser ------------------------------------------------------------------------------------------------------


def test_padding_and_batch_mates_change_nothing() -> None:
    model = new_model()
    long, short = (
        inputs(),
        {
            **inputs(),
            "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]),
            "byt5_text_mask": torch.tensor([[1] * 3, [0] * 3]),
        },
    )
    together = run(model, **short)
    assert torch.allclose(together[0], run(model, **long)[0], atol=1e-5)
    alone = {name: tensor[1:] for name, tensor in short.items()}
    alone |= {
        "text_states": alone["text_states"][:, :2],
        "encoder_attention_mask": torch.ones(1, 2),
        "byt5_text_states": None,
        "byt5_text_mask": None,
    }
    assert torch.allclose(together[1:], run(model, **alone), atol=1e-5)
    garbage = {
        **short,
        "text_states": short["text_states"].clone(),
        "byt5_text_states": short["byt5_text_states"].clone(),
    }
    garbage["text_states"][1, 2:], garbage["byt5_text_states"][1] = 1e4, -1e4
    assert torch.allclose(together, run(model, **garbage), atol=1e-5)
    assert not torch.allclose(together, run(model, **long), atol=1e-2)


def test_a_caption_without_a_token_gives_numbers() -> None:
    given = {**inputs(), "encoder_attention_mask": torch.zeros(2, 5), "byt5_text_mask": torch.zeros(2, 3)}
    assert torch.isfinite(run(new_model(), **given)).all()


def test_mean_flow_and_guidance_reach_the_result() -> None:
    model = new_model(replace(PARAMS, guidance_embed=True, mean_flow=True))
    given = inputs() | {"guidance": torch.tensor([3500.0, 3500.0])}
    first = run(model, **given)
    assert torch.equal(first, run(model, **given, timestep_r=given["timestep"])), (
        "without an earlier time it is the same time"
    )
    assert not torch.allclose(first, run(model, **given, timestep_r=torch.zeros(2)), atol=1e-3)
    assert not torch.allclose(first, run(model, **{**given, "guidance": torch.tensor([1000.0, 1000.0])}), atol=1e-3)
    with pytest.raises(ValueError, match="guidance is None"):
        run(model, **inputs())


def test_a_time_per_token_and_tokens_of_a_block() -> None:
    model = new_model()
    plain = run(model, **inputs())
    times = inputs()["timestep"][:, None].expand(2, 15)
    for layer in (1, 2, 4):
        velocity, tokens = run(model, **{**inputs(), "timestep": times}, feature_layer=layer)
        assert torch.allclose(velocity, plain, atol=1e-4) and tokens.shape == (2, 15, model.feature_width)


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(cpu_offload: bool) -> None:
    def gradients(model: HYImageDiffusionTransformer) -> list[torch.Tensor]:
        model.train()(**inputs()).square().mean().backward()
        return [block.modulation.linear.bias.grad for block in model.single_blocks] + [
            block.txt_mod.linear.bias.grad for block in model.double_blocks[:1]
        ]

    plain, checkpointed = new_model().requires_grad_(True), new_model().requires_grad_(True)
    checkpointed.enable_gradient_checkpointing(cpu_offload)
    assert all(torch.equal(one, other) for one, other in zip(gradients(plain), gradients(checkpointed)))


def test_block_swap_on_the_cpu_and_its_limit() -> None:
    model = new_model(replace(PARAMS, depth=4, depth_single=6))
    expected = run(model, **inputs())
    model.enable_block_swap(3, torch.device("cpu"))
    model.move_to_device_except_swap_blocks(torch.device("cpu"))
    assert torch.equal(run(model, **inputs()), expected)
    with pytest.raises(ValueError, match="at most 4"):
        model.enable_block_swap(5, torch.device("cpu"))


# -- the autoencoder ---------------------------------------------------------------------------------------------------


def test_rows_at_a_time_give_the_same_latents_and_pictures(tmp_path: Path) -> None:
    save_file_atomic(random_state(HunyuanVAE2D(VAE), torch.Generator().manual_seed(1)), tmp_path / "vae.safetensors")
    config = {"norm_groups": VAE.norm_groups}
    whole = hunyuan_image_utils.load_vae(tmp_path / "vae.safetensors", torch.float32, "cpu", config=config)
    rows = hunyuan_image_utils.load_vae(tmp_path / "vae.safetensors", torch.float32, "cpu", config=config, chunk_size=5)
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        latents = whole.encode(images)
        assert latents.shape == (1, 16, 2, 3) and torch.allclose(rows.encode(images), latents, atol=1e-5)
        assert torch.allclose(latents, 0.75289 * whole.encode_raw(images))
        pictures = whole.decode(latents)
        assert pictures.shape == images.shape and torch.allclose(rows.decode(latents), pictures, atol=1e-5)
    rows.set_chunk_rows(None)
    assert all("forward" not in vars(module) for module in rows.modules())
    assert set(load_safetensors(tmp_path / "vae.safetensors")) == set(rows.state_dict())

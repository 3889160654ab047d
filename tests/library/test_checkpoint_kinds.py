"""Recognition of model files by their headers: one tiny file for each kind of model, and for each kind of accident."""

import importlib
import json
import struct

import pytest

from library.checkpoints.kinds import check_slot, describe_checkpoint
from library.checkpoints.loading import open_checkpoint
from library.checkpoints.recognition import PREFIXES
from library.core.errors import CheckpointError
from library.families.registry import records

FLUX = {
    "double_blocks.0.img_attn.norm.query_norm.scale": (16,),
    "double_blocks.1.img_attn.norm.query_norm.scale": (16,),
    "single_blocks.0.linear1.weight": (8, 8),
    "img_in.weight": (8, 64),
}
CROSS = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SD1 = {"input_blocks.0.0.weight": (8, 4, 3, 3), CROSS: (8, 768)}
SDXL = {"input_blocks.0.0.weight": (8, 4, 3, 3), "label_emb.0.0.weight": (8, 2816)}
VAE = {"encoder.down.0.block.0.norm1.weight": (8,), "decoder.conv_in.weight": (8, 16, 3, 3)}
CLIP = "text_model.embeddings.token_embedding.weight"
T5 = {"shared.weight": (32128, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}
WAN = {"patch_embedding.weight": (1536, 16, 1, 2, 2), "blocks.0.self_attn.norm_q.weight": (8,)}
LLAMA = {"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.0.mlp.gate_proj.weight": (8, 8)}


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


MARKS = {"scaled_fp8": (2,), "encoder.block.0.layer.0.SelfAttention.q.scale_weight": (1,)}
CHROMA = {"distilled_guidance_layer.in_proj.weight": (8, 8)}


def bundle(denoiser):
    """Model, autoencoder and text encoders in one file of scaled 8-bit numbers, as ComfyUI writes it."""
    marks = {"scaled_fp8": (2,), **{f"{name.removesuffix('.weight')}.scale_weight": () for name in denoiser}}
    encoders = prefixed("text_encoders.clip_l.transformer.", {CLIP: (49408, 768)})
    encoders |= prefixed("text_encoders.t5xxl.transformer.", T5 | MARKS)
    return prefixed("vae.", VAE) | encoders | prefixed("model.diffusion_model.", denoiser | marks)


KINDS = [
    ("sdxl", SDXL, "SDXL checkpoint"),
    ("sdxl", prefixed("model.diffusion_model.", SDXL) | {"conditioner.embedders.1.model.logit_scale": ()}, "one file"),
    ("sdxl_refiner", SDXL | {"label_emb.0.0.weight": (8, 2560)}, "refiner"),
    ("sd1", SD1, "Stable Diffusion 1"),
    ("sd1", SD1 | {"input_blocks.0.0.weight": (8, 9, 3, 3)}, "inpainting"),
    (
        "sd1",
        prefixed("model.diffusion_model.", SD1) | {"first_stage_model.quant_conv.weight": (8, 8, 1, 1)},
        "one file",
    ),
    ("sd2", SD1 | {CROSS: (8, 1024)}, "Stable Diffusion 2"),
    ("sd3", {"joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "SD3 medium"),
    (
        "sd35_large",
        {"joint_blocks.0.x_block.attn.qkv.weight": (8, 8), "joint_blocks.0.x_block.attn.ln_q.weight": (8,)},
        "SD3.5 large",
    ),
    (
        "sd35_medium",
        {
            "joint_blocks.0.x_block.attn.qkv.weight": (8, 8),
            "joint_blocks.0.x_block.attn.ln_q.weight": (8,),
            "joint_blocks.0.x_block.attn2.qkv.weight": (8, 8),
        },
        "SD3.5 medium",
    ),
    ("chroma", FLUX | CHROMA, "Chroma denoiser (2 double and 1 single blocks)"),
    (
        "chroma",
        CHROMA
        | {
            "transformer_blocks.0.attn.add_k_proj.weight": (8, 8),
            "single_transformer_blocks.1.proj_mlp.weight": (8, 8),
        },
        "Chroma denoiser (1 double and 2 single blocks, diffusers names)",
    ),
    (
        "chroma",
        bundle(FLUX | CHROMA),
        "Chroma denoiser (2 double and 1 single blocks, with its VAE or text encoders in one file)",
    ),
    ("flux", bundle(FLUX), "2 double and 1 single blocks, with its VAE or text encoders in one file"),
    ("t5", T5 | MARKS, "T5 text encoder"),
    ("flux", FLUX, "schnell type, 2 double and 1 single blocks"),
    ("flux", FLUX | {"guidance_in.in_layer.weight": (8, 8)}, "dev type"),
    ("flux", prefixed("model.diffusion_model.", FLUX | {"img_in.weight": (8, 384)}), "fill model"),
    (
        "flux",
        {"transformer_blocks.0.attn.add_k_proj.weight": (8, 8), "single_transformer_blocks.0.proj_mlp.weight": (8, 8)},
        "diffusers names",
    ),
    (
        "lllite", {"lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight": (16, 3, 4, 4)},
        "ControlNet-LLLite",
    ),
    ("flux_controlnet", FLUX | {"controlnet_blocks.0.weight": (8, 8)}, "ControlNet"),
    (
        "framepack",
        {
            "clean_x_embedder.proj_2x.weight": (8, 8),
            "transformer_blocks.0.attn.add_k_proj.weight": (8, 8),
            "single_transformer_blocks.0.proj_mlp.weight": (8, 8),
        },
        "FramePack",
    ),
    ("hunyuan_image", {"byt5_in.fc1.weight": (8, 8), "img_in.proj.weight": (8, 64, 1, 1)}, "HunyuanImage"),
    (
        "hunyuan_video",
        {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,), "img_in.proj.weight": (8, 16, 1, 2, 2)},
        "text to video",
    ),
    ("lumina2", {"cap_embedder.1.weight": (2304, 8), "noise_refiner.0.attention.qkv.weight": (8, 8)}, "Lumina"),
    ("nextdit", {"cap_embedder.1.weight": (3840, 8), "noise_refiner.0.attention.qkv.weight": (8, 8)}, "not Lumina"),
    ("anima", {"net.blocks.0.adaln_modulation_self_attn.1.weight": (8, 8), "net.llm_adapter.x": (8,)}, "Anima"),
    ("cosmos", {"net.blocks.0.adaln_modulation_self_attn.1.weight": (8, 8)}, "Cosmos"),
    ("wan", WAN, "1.3B text to video"),
    (
        "wan",
        WAN | {"patch_embedding.weight": (5120, 36, 1, 2, 2), "img_emb.proj.1.weight": (8, 8)},
        "14B image to video",
    ),
    ("vae_flux", VAE, "16 latent channels"),
    ("vae_sd", VAE | {"quant_conv.weight": (8, 8, 1, 1), "decoder.conv_in.weight": (8, 4, 3, 3)}, "4 latent channels"),
    ("vae_hunyuan_image", VAE | {"encoder.down.5.block.0.norm1.weight": (8,)}, "HunyuanImage"),
    ("vae_wan", {"encoder.downsamples.0.residual.0.gamma": (8, 1, 1, 1)}, "Wan"),
    ("vae_wan", {"encoder.down_blocks.0.conv1.weight": (8, 8, 3, 3, 3), "quant_conv.weight": (8, 8, 1, 1, 1)}, "Wan"),
    ("vae_hunyuan_video", {"encoder.down_blocks.0.resnets.0.conv1.conv.weight": (8, 8, 3, 3, 3)}, "HunyuanVideo"),
    ("clip_l", {CLIP: (49408, 768), "text_model.encoder.layers.11.mlp.fc1.weight": (8, 8)}, "width 768, 12 layers"),
    ("clip_g", {CLIP: (49408, 1280)}, "CLIP-G"),
    (
        "clip_g",
        {"transformer.resblocks.0.attn.in_proj_weight": (8, 8), "token_embedding.weight": (49408, 1280)},
        "open_clip",
    ),
    ("t5", T5, "T5 text encoder"),
    ("byt5", T5 | {"shared.weight": (1510, 8)}, "ByT5"),
    ("umt5", T5 | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4)}, "UMT5"),
    ("umt5", {"blocks.0.pos_embedding.embedding.weight": (32, 4), "token_embedding.weight": (8, 8)}, "UMT5"),
    (
        "qwen25_vl",
        LLAMA | {"model.layers.0.self_attn.q_proj.bias": (8,), "visual.blocks.0.norm1.weight": (8,)},
        "Qwen2.5-VL",
    ),
    ("qwen3", LLAMA | {"model.layers.0.self_attn.q_norm.weight": (8,)}, "Qwen3"),
    ("gemma2", LLAMA | {"model.layers.0.pre_feedforward_layernorm.weight": (8,)}, "Gemma"),
    ("llama", LLAMA, "LLaMA"),
    ("siglip", {"vision_model.head.probe": (1, 1, 8)}, "SigLIP"),
    ("adapter", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8)}, "FLUX.1 or Chroma"),
    ("adapter", {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "FLUX.1 or Chroma"),
    ("adapter", {"lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight": (4, 8)}, "HunyuanImage"),
    ("adapter", {"lora_unet_single_blocks_0_modulation_linear.lora_down.weight": (4, 8)}, "HunyuanImage"),
    ("adapter", {"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": (4, 8)}, "HunyuanImage"),
    ("adapter", {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 8)}, "FLUX.1 or Chroma"),
    ("adapter", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3584)}, "HunyuanImage"),
    ("adapter", {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3584)}, "HunyuanImage"),
    ("adapter", {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}, "FLUX.1 or Chroma"),
    ("adapter", {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 8)}, "SDXL"),
    ("adapter", {"unet.down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q.lora_A.weight": (4, 8)}, "SDXL"),
    (
        "adapter",
        {"unet.down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 8)},
        "Stable Diffusion 1",
    ),
    ("adapter", {"lora_unet_blocks_7_mlp_layer1.lora_down.weight": (4, 8)}, "Anima"),
    ("adapter", {"lora_unet_blocks_0_cross_attn_q.lora_down.weight": (4, 8)}, "Wan"),
    (
        "clip_l",
        {"embeddings.token_embedding.weight": (49408, 768), "encoder.layers.11.mlp.fc1.weight": (8, 8)},
        "width 768, 12 layers",
    ),
    ("adapter", {"lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a": (4, 8)}, "Stable Diffusion 1"),
    ("adapter", {"lycoris_something.lokr_w1": (4, 8)}, "LoRA-type adapter"),
    ("embedding", {"emb_params": (4, 768)}, "textual inversion"),
    ("embedding", {"clip_l": (4, 768), "t5xxl": (4, 4096)}, "textual inversion"),
    ("embedding", {"IN01": (4, 768), "MID": (4, 768)}, "vectors for each layer"),
    ("unknown", {"something.weight": (4, 8)}, "not known here"),
]


def write_file(path, shapes, cut=0):
    """A safetensors file of zeros with these shapes; float8 keeps wide ones small. `cut` bytes are missing at its
    end."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        header[name] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position - cut)
    return path


@pytest.mark.parametrize("kind, shapes, words", KINDS, ids=[f"{kind}-{words}" for kind, _, words in KINDS])
def test_a_model_is_recognised_by_its_names_and_shapes(tmp_path, kind, shapes, words):
    found = describe_checkpoint(write_file(tmp_path / "file.safetensors", shapes))
    assert found.kind == kind
    assert words in found.detail


@pytest.mark.parametrize(
    "kind, content, words",
    [
        ("empty", b"", "empty file"),
        ("pickle", b"PK\x03\x04archive/data.pkl", "pickle"),
        ("pickle", b"\x80\x02}q\x00.", "pickle"),
        ("gguf", b"GGUF\x03\0\0\0", "GGUF"),
        ("text", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("text", b"  <!DOCTYPE html><html>", "web page"),
        ("text", b"just some words", "text file"),
        ("truncated", struct.pack("<Q", 5000) + b'{"x": {', "truncated"),
        ("damaged", struct.pack("<Q", 7) + b'{"x": {', "damaged"),
        ("other", bytes(range(200, 256)) * 4, "not safetensors"),
    ],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(tmp_path, kind, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    found = describe_checkpoint(path)
    assert found.kind == kind and not found.is_model
    assert words in found.detail


def test_a_file_that_ends_too_early_is_truncated(tmp_path):
    found = describe_checkpoint(write_file(tmp_path / "flux.safetensors", FLUX, cut=100))
    assert found.kind == "truncated"


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    write_file(tmp_path / "clip_l.safetensors", {CLIP: (10, 8)})
    assert "did you mean 'clip_l.safetensors'" in describe_checkpoint(tmp_path / "clipl.safetensors").detail


def test_a_sharded_folder_is_read_through_its_index(tmp_path):
    names = list(FLUX)
    write_file(tmp_path / "m-00001-of-00002.safetensors", {names[0]: FLUX[names[0]]})
    write_file(tmp_path / "m-00002-of-00002.safetensors", {name: FLUX[name] for name in names[1:]})
    weight_map = {name: f"m-0000{1 if name == names[0] else 2}-of-00002.safetensors" for name in names}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert describe_checkpoint(tmp_path).kind == "flux"
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    found = describe_checkpoint(tmp_path)
    assert found.kind == "damaged" and "m-00002-of-00002.safetensors" in found.detail


@pytest.mark.parametrize(
    "given", ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"]
)
def test_any_file_of_a_split_model_and_its_index_name_all_of_it(tmp_path, given):
    names = list(FLUX)
    write_file(tmp_path / "m-00001-of-00002.safetensors", {names[0]: FLUX[names[0]]})
    write_file(tmp_path / "m-00002-of-00002.safetensors", {name: FLUX[name] for name in names[1:]})
    weight_map = {name: f"m-0000{1 if name == names[0] else 2}-of-00002.safetensors" for name in names}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert describe_checkpoint(tmp_path / given).kind == "flux"
    assert sorted(open_checkpoint(tmp_path / given).shapes) == sorted(names)
    (tmp_path / "m-00001-of-00002.safetensors").write_bytes(b"GGUF\x03\0\0\0")
    found = describe_checkpoint(tmp_path / given)
    of_which = "" if given == "m-00001-of-00002.safetensors" else "m-00001-of-00002.safetensors is "
    assert found.kind == "gguf" and f"{of_which}a quantised GGUF file" in found.detail
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    if given != "m-00001-of-00002.safetensors":
        found = describe_checkpoint(tmp_path / given)
        assert found.kind == "damaged" and "m-00001-of-00002.safetensors" in found.detail
        with pytest.raises(CheckpointError, match="m-00001-of-00002.safetensors"):
            open_checkpoint(tmp_path / given)


def test_an_index_that_lists_nothing_is_named(tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text("{}")
    assert "no weight_map" in check_slot(tmp_path / "m.safetensors.index.json", "ae", {"vae_flux"})


def test_a_pipeline_folder_fits_by_the_part_that_is_needed(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "FluxPipeline" in describe_checkpoint(tmp_path).detail
    (tmp_path / "text_encoder").mkdir()
    write_file(tmp_path / "text_encoder" / "model.safetensors", {CLIP: (10, 8)})
    assert check_slot(tmp_path, "clip_l", {"clip_l"}) is None
    assert "FluxPipeline" in check_slot(tmp_path, "t5xxl", {"t5"})


def test_a_folder_without_an_index_fits_by_its_part_whatever_lies_beside_it(tmp_path):
    """As `tools/convert_model.py` writes Lumina: readers look into `transformer` first."""
    (tmp_path / "transformer").mkdir()
    names = {"time_caption_embed.caption_embedder.1.weight": (8, 4), "noise_refiner.0.attn.to_q.weight": (8, 8)}
    write_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", names)
    assert check_slot(tmp_path, "pretrained_model_name_or_path", {"lumina2"}) is None
    write_file(tmp_path / "original_rest.safetensors", {"norm_final.weight": (8,)})
    assert check_slot(tmp_path, "pretrained_model_name_or_path", {"lumina2"}) is None
    assert "not known here" in check_slot(tmp_path, "pretrained_model_name_or_path", {"flux"})


def test_the_message_of_a_slot_says_what_the_file_is_and_what_is_needed(tmp_path):
    path = write_file(tmp_path / "sdxl.safetensors", SDXL)
    message = check_slot(path, "clip_l", {"clip_l"})
    assert (
        message == f"--clip_l is {path}: this is an SDXL checkpoint; needed: a CLIP-L text encoder (clip_l.safetensors)"
    )
    assert check_slot(path, "pretrained_model_name_or_path", {"sdxl"}) is None
    assert "is not given" in check_slot(None, "ae", {"vae_flux"})
    pickle = tmp_path / "old.ckpt"
    pickle.write_bytes(b"PK\x03\x04")
    assert "this is a pickle" in check_slot(pickle, "ae", {"vae_flux"})


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path, length):
    """640 is 80 02 in the file, which is how pickles of protocol 2 begin."""

    path = tmp_path / "a.safetensors"
    entry = {"lora_unet_x.lora_down.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(entry).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", length) + text + bytes(4))
    assert describe_checkpoint(path).kind == "adapter"


def test_the_way_out_for_scripts_that_make_images(tmp_path):
    path = write_file(tmp_path / "given.safetensors", SDXL)
    trained = check_slot(path, "ckpt", {"sd1", "sd2"})
    assert trained.endswith(
        "needed: a Stable Diffusion 1 or 2 checkpoint or diffusers folder; sdxl_train_network.py trains such a model"
    )
    assert check_slot(path, "ckpt", {"sd1", "sd2"}, for_pictures=True).endswith(
        "; sdxl_gen_img.py makes images with such a model"
    )


def test_ids_of_the_hub_are_refused_with_the_command_that_fetches_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download owner/name.v1 --local-dir FOLDER" in check_slot("owner/name.v1", "ckpt", {"sd1"})
    (tmp_path / "models").mkdir()
    for path in ("models/base", "owner/base.safetensors", "owner/group/base", "base"):
        assert "hf download" not in check_slot(path, "ckpt", {"sd1"})


def test_what_a_loader_reads_is_recognised_at_start():
    """Prefixes of denoisers, which stand in both places."""
    for record in records().values():
        if record.targets:
            readers = importlib.import_module(f"library.{record.name}_utils")
            missing = set(getattr(readers, "DENOISER_PREFIXES", ())) - set(PREFIXES)
            assert not missing, f"{record.name}: {missing}"

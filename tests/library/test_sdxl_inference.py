"""The image script of SDXL through its command line, on a tiny base, and against diffusers' pipeline on the same
weights."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.generation import sdxl_inference
from library.generation.recorded_requests import ENTRY
from library.safetensors_utils import load_safetensors, save_file_atomic
from tests.library.generation.made_again import check_made_again, lines_file
from tests.tiny import write_clip_tokenizer
from tests.tiny_sd import build_tiny_sd

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("tiny"), "sdxl")


def write_adapter(path: Path, seed: int) -> Path:
    """A LoRA of one U-Net layer and one layer of each text encoder, with weights that show."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    places = (
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 32, 32),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 64, 16),
        ("lora_te2_text_model_encoder_layers_1_self_attn_v_proj", 32, 32),
    )  # fmt: skip
    for name, rows, columns in places:
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 2
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 2
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file_atomic(tensors, path)
    return path


@pytest.fixture(scope="module")
def adapters(tiny) -> tuple[Path, Path]:
    return write_adapter(tiny.folder / "one.safetensors", 4), write_adapter(tiny.folder / "two.safetensors", 5)


def arguments(tiny, folder, *more: str) -> list[str]:
    return [
        f"--ckpt_path={tiny.model}", f"--clip_tokenizer={tiny.tokenizer}", "--dtype=float32", "--width=64",
        "--height=48", "--steps=2",
        "--seed=5", "--prompt=a red cat", f"--output_dir={folder}", *more,
    ]  # fmt: skip


def pixels(paths) -> list[bytes]:
    return [Image.open(path).tobytes() for path in paths]


def picture(tiny, folder, *more: str) -> bytes:
    (made,) = pixels(sdxl_inference.run(arguments(tiny, folder, *more)))
    return made


def largest_difference(first: bytes, second: bytes) -> int:
    return max(abs(a - b) for a, b in zip(first, second))


def test_a_picture_with_its_settings(tiny, tmp_path):
    (path,) = sdxl_inference.run(arguments(tiny, tmp_path / "new", "--prompt2=the dog"))
    assert path.name.endswith("_5_00.png") and list(path.parent.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.size == (64, 48)
        texts = dict(image.text)
        assert texts.pop(ENTRY) and texts == {
            "prompt": "a red cat", "negative-prompt": "", "seed": "5", "steps": "2", "scale": "7.0",
            "prompt2": "the dog", "sampler": "euler",
        }  # fmt: skip
    assert not Image.open(sdxl_inference.run(arguments(tiny, tmp_path, "--no_metadata"))[0]).text


def test_equal_options_give_equal_pictures_and_each_option_tells(tiny, tmp_path):
    base = picture(tiny, tmp_path)
    assert (
        base
        == picture(tiny, tmp_path)
        == picture(tiny, tmp_path, "--prompt2=a red cat")
        == picture(tiny, tmp_path, f"--vae={tiny.model}")
    )
    others = [
        ("--seed=6",), ("--prompt=the dog",), ("--prompt2=the dog",), ("--negative_prompt=blue square",),
        ("--cfg_scale=1",),
        ("--steps=3",), ("--sampler=euler_a",), ("--sampler=dpmsolver++", "--steps=3"), ("--v_parameterization",),
        ("--zero_terminal_snr",),
        ("--dtype=bfloat16",),
    ]  # fmt: skip
    assert len({base, *(picture(tiny, tmp_path, *more) for more in others)}) == len(others) + 1
    assert picture(tiny, tmp_path, "--cfg_scale=1") == picture(
        tiny, tmp_path, "--cfg_scale=1", "--negative_prompt=blue square"
    )


def test_a_file_that_says_that_it_predicts_velocity(tiny, tmp_path):
    tensors = load_safetensors(tiny.model, "cpu") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    config = {
        "heads": tiny.params.heads, "norm_groups": 4, "vae": {"norm_groups": 4},
        **{name: {"heads": 2, "eos": len(json.loads((tiny.tokenizer / "vocab.json").read_text(encoding="utf-8"))) - 1} for name in ("clip_l", "clip_g")},
    }  # fmt: skip
    save_file_atomic(tensors, tmp_path / "v.safetensors", {"model_config": json.dumps(config)})
    expected = picture(tiny, tmp_path, "--v_parameterization", "--zero_terminal_snr")
    assert picture(tiny, tmp_path, f"--ckpt_path={tmp_path / 'v.safetensors'}") == expected


def test_adapters(tiny, adapters, tmp_path):
    one, two = map(str, adapters)
    base = picture(tiny, tmp_path)
    hooked = picture(tiny, tmp_path, "--lora_weights", f"{one};0.8")
    assert hooked != base and picture(tiny, tmp_path, "--lora_weights", f"{one};0") == base
    assert (
        largest_difference(hooked, picture(tiny, tmp_path, "--lora_weights", f"{one};0.8", "--merge_lora_weights")) <= 1
    )
    both = picture(tiny, tmp_path, "--lora_weights", f"{one};0.8", two)
    assert both not in (hooked, base)
    assert (
        largest_difference(both, picture(tiny, tmp_path, "--lora_weights", f"{one};0.8", two, "--merge_lora_weights"))
        <= 1
    )


def test_prompts_from_a_file_and_typed_ones(tiny, adapters, tmp_path, monkeypatch):
    content = "a red cat --w 48 --l 1\na red cat --m 0\na red cat --m 1\nthe dog --p2 the cat --n blue --s 3\n"
    (tmp_path / "prompts.txt").write_text(content, encoding="utf-8")
    lora = ("--lora_weights", f"{adapters[0]};0.5")
    from_file = sdxl_inference.run(arguments(tiny, tmp_path / "a", f"--from_file={tmp_path / 'prompts.txt'}", *lora))
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(content.replace("the dog", "--w 1\n--m 1,2\n--s 1001\nthe dog") + "\n")
    )
    typed = sdxl_inference.run(arguments(tiny, tmp_path / "b", "--interactive", *lora))
    assert len(typed) == 4 and pixels(from_file) == pixels(typed)
    assert Image.open(from_file[0]).size == (48, 48)
    assert pixels(from_file)[1:3] == [
        picture(tiny, tmp_path),
        picture(tiny, tmp_path, "--lora_weights", str(adapters[0])),
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--dtype=fp8",), "8-bit storage"), (("--steps=1001",), "1000 or less"), (("--width=4",), "8 or more"),
        (("--clip_tokenizer=none",), "clip_tokenizer is none"),
    ],
)  # fmt: skip
def test_bad_options(tiny, tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        sdxl_inference.run(arguments(tiny, tmp_path, *more))


def test_every_wrong_file_is_named_before_anything_is_loaded(tiny, tmp_path):
    sd1 = build_tiny_sd(tmp_path / "sd1", "sd1")
    with pytest.raises(ConfigError) as caught:
        sdxl_inference.run(
            [f"--ckpt_path={sd1.model}", "--vae=none.safetensors", "--lora_weights", f"{sd1.model};x", str(sd1.model)]
        )
    options = [problem.split()[0] for problem in caught.value.problems]
    assert options == ["--ckpt_path", "--vae", "--lora_weights", "--lora_weights"]
    flux_lora = tmp_path / "flux.safetensors"
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file_atomic(
        {f"{key}.lora_down.weight": torch.zeros(4, 32), f"{key}.lora_up.weight": torch.zeros(96, 4)}, flux_lora
    )
    command = [
        sys.executable,
        "sdxl_minimal_inference.py",
        *arguments(tiny, tmp_path, "--lora_weights", str(flux_lora)),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        result.returncode == 2
        and "is a LoRA-type adapter for FLUX.1 or Chroma; needed: one for SDXL" in result.stderr
        and "Traceback" not in result.stderr
    )


# -- against diffusers -------------------------------------------------------------------------------------------------


def reference_pipeline(folder: Path):
    """A small pipeline with random weights, also written as a folder."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    vocab = write_clip_tokenizer(folder / "plain")
    torch.manual_seed(7)

    def text_config(width: int, act: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=3,
            num_attention_heads=2, hidden_act=act, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=0,
        )  # fmt: skip

    first, second = CLIPTextModel(text_config(16, "quick_gelu")), CLIPTextModelWithProjection(text_config(32, "gelu"))
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=48, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 48,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.13025, force_upcast=False,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    tokenizers = [
        CLIPTokenizer(str(folder / "plain/vocab.json"), str(folder / "plain/merges.txt"), model_max_length=77, pad_token=pad)
        for pad in ("<|endoftext|>", "!")
    ]  # fmt: skip
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        unet=unet, scheduler=scheduler,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_same_picture_as_diffusers(tmp_path):
    from library.generation.sdxl_pipeline import load_pipeline

    reference = reference_pipeline(tmp_path)
    given = {
        "prompt": "a red cat", "prompt_2": "the dog of the girl", "negative_prompt": "blue",
        "negative_prompt_2": "blue", "height": 64,
        "width": 96, "num_inference_steps": 5, "guidance_scale": 7.0,
    }  # fmt: skip
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    expected = reference(**given, latents=noise.clone(), output_type="latent").images
    options = sdxl_inference.SdxlModelOptions(
        ckpt_path=str(tmp_path / "model"), clip_tokenizer=str(tmp_path / "plain"), dtype="float32"
    )
    sdxl_inference.check(options)
    request = sdxl_inference.SdxlRequest(
        prompt="a red cat", prompt2="the dog of the girl", negative_prompt="blue", width=96, height=64, steps=5, seed=5,
        cfg_scale=7.0,
        sampler="euler",
    )  # fmt: skip
    pipeline = load_pipeline(options)
    latents = pipeline.generate(request)
    assert ((latents - expected).norm() / expected.norm()).item() < 1e-4
    theirs = reference(**given, latents=noise.clone(), output_type="pil").images[0]
    assert largest_difference(pipeline.decode(latents).tobytes(), theirs.tobytes()) <= 1


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    lines = lines_file(tmp_path, "a cat", "a dog --p2 blue --s 1 --l 2 --d 4")
    made = sdxl_inference.run(arguments(tiny, tmp_path / "first", lines))
    check_made_again(sdxl_inference.run, made, "output_dir")

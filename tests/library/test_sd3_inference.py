"""The image script of SD3 through its command line: the pictures of a training's samples, guidance, adapters, lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.generation import sd3_inference
from library.safetensors_utils import save_file_atomic
from library.tiny_models.sd3_tiny import TinySd3, build_tiny_sd3
from tests.families import CASES
from tests.library.generation.made_again import check_made_again, lines_file
from tests.runs.conftest import Work, draw_pictures, sample_pictures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySd3:
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3"), with_whole=True)


@pytest.fixture(scope="module")
def adapter(tiny) -> Path:
    """A LoRA of denoiser and text encoders with weights that show."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    sizes = {
        "unet_joint_blocks_1_x_block_attn_qkv": (32, 96), "unet_joint_blocks_0_context_block_mlp_fc1": (32, 128),
        "te1_text_model_encoder_layers_0_mlp_fc1": (16, 64), "te2_text_model_encoder_layers_0_self_attn_q_proj": (24, 24),
    }  # fmt: skip
    for name, (size_in, size_out) in sizes.items():
        tensors[f"lora_{name}.lora_down.weight"] = torch.randn(4, size_in, generator=generator) / 2
        tensors[f"lora_{name}.lora_up.weight"] = torch.randn(size_out, 4, generator=generator) / 2
        tensors[f"lora_{name}.alpha"] = torch.tensor(4.0)
    path = tiny.folder / "adapter.safetensors"
    save_file_atomic(tensors, path)
    return path


def arguments(tiny: TinySd3, folder: Path, *more: str) -> list[str]:
    given = {word.partition("=")[0] for word in more}
    own = [
        f"--ckpt_path={tiny.model}", f"--clip_l={tiny.clip_l}", f"--clip_g={tiny.clip_g}", f"--t5xxl={tiny.t5xxl}",
        f"--clip_l_tokenizer={tiny.tokenizer}", "--t5xxl_token_length=48", "--prompt=a red cat", "--width=64",
        "--height=64", "--steps=2", "--seed=5", f"--output_dir={folder}",
    ]  # fmt: skip
    return [*(word for word in own if word.partition("=")[0] not in given), *more]


def pixels_of(paths: list[Path]) -> list[bytes]:
    return [Image.open(path).tobytes() for path in paths]


def picture(tiny: TinySd3, folder: Path, *more: str) -> bytes:
    return pixels_of(sd3_inference.run(arguments(tiny, folder, *more)))[0]


def test_samples_of_a_training_are_the_pictures_of_the_script(tiny, tmp_path) -> None:
    work = Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 2), case=CASES["sd3"])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a red cat --w 72 --h 64 --s 3 --d 5 --l 4 --n blue\na red cat --w 64 --h 64 --s 2 --d 5 --l 1\n",
        encoding="utf-8",
    )
    work.train("out", "--max_train_steps=1", f"--sample_prompts={prompts}", "--sample_at_first")
    samples = sorted(path for path in sample_pictures(tmp_path / "out") if "000000" in path.name)
    guided = picture(tiny, tmp_path, "--width=72", "--steps=3", "--cfg_scale=4", "--negative_prompt=blue")
    plain = picture(tiny, tmp_path, "--cfg_scale=1")
    assert pixels_of(samples) == [guided, plain]  # 72 pixels are nine patches and a half


def test_equal_options_give_equal_pictures_and_each_option_tells(tiny, tmp_path) -> None:
    base = picture(tiny, tmp_path)
    assert base == picture(tiny, tmp_path, "--offload")
    changes = (
        "--seed=6", "--prompt=the dog", "--steps=3", "--cfg_scale=1", "--negative_prompt=blue", "--t5xxl_token_length=12",
        "--apply_lg_attn_mask", "--apply_t5_attn_mask", "--enable_scaled_pos_embed", "--bf16",
    )  # fmt: skip
    others = [picture(tiny, tmp_path, change) for change in changes]
    assert len({base, *others}) == 1 + len(changes)


def test_both_prompts_one_after_the_other(tiny, tmp_path) -> None:
    pair = (picture(tiny, tmp_path, "--negative_prompt=blue", *more) for more in ((), ("--split_uncond",)))
    one, other = (torch.frombuffer(bytearray(pixels), dtype=torch.uint8).int() for pixels in pair)
    assert (one - other).abs().max() <= 1


def test_a_whole_model_needs_no_other_file_and_t5_may_be_absent(tiny, tmp_path) -> None:
    words = [
        w for w in arguments(tiny, tmp_path) if not w.startswith(("--clip_l=", "--clip_g=", "--t5xxl=", "--ckpt_path"))
    ]
    (whole,) = sd3_inference.run([*words, f"--ckpt_path={tiny.whole}"])
    one, other = (
        torch.frombuffer(bytearray(p), dtype=torch.uint8).int()
        for p in (pixels_of([whole])[0], picture(tiny, tmp_path))
    )
    assert (one - other).abs().max() <= 1  # tensors at other places in memory
    files = [f"--ckpt_path={tiny.model}", f"--clip_l={tiny.clip_l}", f"--clip_g={tiny.clip_g}"]
    (without,) = sd3_inference.run([*words, *files])
    assert pixels_of([without])[0] != pixels_of([whole])[0]


def test_the_smallest_picture_by_option_and_by_line(tiny, tmp_path, caplog) -> None:
    (tmp_path / "lines.txt").write_text("the dog --w 8 --h 8\n", encoding="utf-8")
    lines = sd3_inference.run(arguments(tiny, tmp_path / "a", f"--from_file={tmp_path / 'lines.txt'}", "--seed=5"))
    more = ("--width=8", "--height=8", "--seed=5", "--prompt=the dog", "--merge_lora_weights")
    assert pixels_of(lines) == pixels_of(sd3_inference.run(arguments(tiny, tmp_path / "b", *more)))
    assert Image.open(lines[0]).size == (8, 8)
    assert "--merge_lora_weights has no effect: there are no adapters" in caplog.text


def test_an_adapter_hooked_and_merged(tiny, adapter, tmp_path) -> None:
    base, hooked = picture(tiny, tmp_path), picture(tiny, tmp_path, "--lora_weights", f"{adapter};0.8")
    merged = picture(tiny, tmp_path, "--lora_weights", f"{adapter};0.8", "--merge_lora_weights")
    assert picture(tiny, tmp_path, "--lora_weights", f"{adapter};0") == base
    one, other, plain = (torch.frombuffer(bytearray(p), dtype=torch.uint8).int() for p in (hooked, merged, base))
    assert (one - other).abs().max() <= 1 < (one - plain).abs().max()


def test_lines_of_a_file_and_typed_ones(tiny, tmp_path, monkeypatch) -> None:
    lines = ["the dog --w 80 --h 64 --s 1 --d 7 --c 3 --n blue", "--d 6"]
    (tmp_path / "lines.txt").write_text("# two\n" + "\n".join(lines) + "\n", encoding="utf-8")
    from_file = sd3_inference.run(arguments(tiny, tmp_path / "a", f"--from_file={tmp_path / 'lines.txt'}"))
    typed = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert pixels_of(sd3_inference.run(arguments(tiny, tmp_path / "b", "--interactive"))) == pixels_of(from_file)
    assert [Image.open(path).size for path in from_file] == [(80, 64), (64, 64)]
    assert pixels_of(from_file)[1] == picture(tiny, tmp_path, "--seed=6")


def test_a_picture_beyond_the_positions_of_the_model_is_told_and_the_others_are_made(tiny, tmp_path) -> None:
    with pytest.raises(ConfigError, match="the picture is 512x64; .* 384 pixels a side: .* --enable_scaled_pos_embed"):
        sd3_inference.run(arguments(tiny, tmp_path, "--width=512"))
    (tmp_path / "lines.txt").write_text("one --w 512\ntwo\n", encoding="utf-8")
    sd3_inference.run(arguments(tiny, tmp_path, f"--from_file={tmp_path / 'lines.txt'}"))
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_wrong_files_are_named_before_anything_is_loaded(tiny, adapter, tmp_path) -> None:
    def told(*more: str) -> str:
        with pytest.raises(ConfigError) as error:
            sd3_inference.run(arguments(tiny, tmp_path, *more))
        return str(error.value)

    assert "this is a CLIP-L text encoder" in told(f"--ckpt_path={tiny.clip_l}")
    assert "are they exchanged?" in told(f"--clip_l={tiny.clip_g}", f"--clip_g={tiny.clip_l}")
    assert "needed: a T5-XXL" in told(f"--t5xxl={tiny.model}")
    assert "--fp16 and --bf16" in told("--fp16", "--bf16")
    save_file_atomic(
        {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "flux.safetensors"
    )
    assert "FLUX.1 or Chroma" in told("--lora_weights", f"{tmp_path / 'flux.safetensors'}")


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    lines = lines_file(tmp_path, "a cat", "a dog --s 1 --l 2 --w 48")
    made = sd3_inference.run(arguments(tiny, tmp_path / "first", lines))
    check_made_again(sd3_inference.run, made, "output_dir")

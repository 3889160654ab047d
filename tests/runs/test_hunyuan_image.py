"""What is special to HunyuanImage 2.1, through the command line: metadata, glyphs in caches, options, distilled models,
sizes, wrong files. What holds for every family is in test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.tiny_models.hunyuan_image_tiny import TinyHunyuanImage, build_tiny_hunyuan_image
from tests.families import CASES
from tests.runs.conftest import Work, draw_pictures, losses_of, read_parts, sample_pictures
from tools import convert_model

CASE = CASES["hunyuan_image"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuanImage:
    return build_tiny_hunyuan_image(tmp_path_factory.mktemp("tiny_hunyuan_image"))


@pytest.fixture
def work(tmp_path: Path, tiny: TinyHunyuanImage) -> Work:
    return Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 4), case=CASE)


def quote(images: Path) -> None:
    """Captions of different lengths, two of which quote a text."""
    texts = ["a cat", 'a sign, “open” and "shut", of a dog in the garden', 'says "x"', "the red circle is blue"]
    for path, text in zip(sorted(images.glob("*.txt")), texts):
        path.write_text(text, encoding="utf-8")


def test_the_file_is_as_documented(work: Work) -> None:
    path = work.train("out", "--max_train_steps=2", *CASE.caches(on_disk=False))
    metadata = read_parts(path)[0]
    assert metadata["ss_timestep_sampling"] == "sigma" and metadata["ss_discrete_flow_shift"] == "5.0"
    assert (
        metadata["ss_model_prediction_type"] == "raw" and metadata["modelspec.architecture"] == "hunyuan-image-2.1/lora"
    )
    assert "ss_weighting_scheme" not in metadata and "ss_guidance_scale" not in metadata
    modules = {key.partition(".")[0] for key in load_file(path)}
    assert len(modules) == 10 + 2 * 3 and "lora_unet_double_blocks_0_txt_attn_qkv" in modules


@pytest.mark.parametrize("batch", [1, 4])
def test_glyphs_and_lengths_in_caches_change_no_byte(work: Work, batch: int) -> None:
    """Captions with and without quoted texts, encoded one by one, in twos, or in the step."""
    quote(work.images)
    data = work.dataset(batch_size=batch, subset_keys="caption_dropout_rate = 0.3")
    options = ["--max_train_steps=4", "--text_encoder_batch_size=2"]
    live = read_parts(work.train("live", *options, dataset=data))[1]
    for name, on_disk in (("memory", False), ("disk", True), ("again", True)):
        assert read_parts(work.train(name, *options, *CASE.caches(on_disk=on_disk), dataset=data))[1] == live, name
    (work.images / "01.txt").write_text("a sign, open and shut, of a dog in the garden", encoding="utf-8")
    assert read_parts(work.train("unquoted", *options, dataset=data))[1] != live


CHANGING = [
    "--timestep_sampling=flux_shift", "--discrete_flow_shift=1", "--weighting_scheme=logit_normal",
    "--model_prediction_type=sigma_scaled", "--fp8_scaled", "--fp8_vl", "--mixed_precision=bf16 --fp8_base",
    "--network_args split_qkv=True", "--network_args network_reg_dims=_mod_=0",
]  # fmt: skip
EQUAL = [
    "--attn_mode=torch_efficient", "--split_attn", "--gradient_checkpointing", "--text_encoder_cpu",
    "--network_train_unet_only", "--text_encoder_lr 1e-4 2e-4", "--guidance_scale=1", "--blocks_to_swap=0",
    "--gradient_checkpointing --cpu_offload_checkpointing", "--vae_tiling",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny: TinyHunyuanImage) -> tuple[Work, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("plain")
    base = Work(folder, tiny, draw_pictures(folder / "images", 2), case=CASE)
    return base, load_file(base.train("plain", "--max_train_steps=2"))


@pytest.mark.parametrize("options", [*CHANGING, *EQUAL])
def test_what_an_option_does_to_the_result(plain, options: str) -> None:
    base, expected = plain
    result = load_file(base.train(options.replace("/", "_"), "--max_train_steps=2", *options.split(" ")))
    if options in CHANGING:
        assert set(result) != set(expected) or any(not torch.equal(result[key], expected[key]) for key in expected)
        return
    for key, tensor in expected.items():
        torch.testing.assert_close(result[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_an_autoencoder_by_rows_gives_the_same_losses(work: Work) -> None:
    losses = [losses_of(work.train(f"r{rows}", f"--vae_chunk_size={rows}", "--max_train_steps=3")) for rows in (4, 999)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_autoencoder_of_diffusers_trains_the_same(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    """Given as pipeline folder or as the part in it, whose caches are the same, whatever else lies in the folder."""
    folder, options = work.folder / "folder", ["--max_train_steps=2", "--console_log_level=INFO"]
    assert convert_model.main([str(work.tiny.vae), str(folder), "--to", "diffusers"]) == 0
    expected = read_parts(work.train("file", *options))[1]
    disk = [*options, *CASE.caches(on_disk=True)]
    assert read_parts(work.train("folder", *disk, f"--vae={folder}"))[1] == expected
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")
    for place in (folder, folder / "vae"):
        caplog.clear()
        assert read_parts(work.train(f"again {place.name}", *disk, f"--vae={place}"))[1] == expected
        assert "latents: 4 images cached, 0 to encode" in caplog.text


def test_larger_pictures_in_tiles(tmp_path: Path, tiny: TinyHunyuanImage, caplog: pytest.LogCaptureFixture) -> None:
    """Live and cached are the same; a cache that was made the other way is made again, and says why; a sample is
    decoded in tiles too."""
    work = Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 2, (416, 416)), case=CASE)
    data, prompts = tmp_path / "large.toml", tmp_path / "prompts.txt"
    data.write_text(f"[[datasets]]\nresolution = 416\n[[datasets.subsets]]\nimage_dir = '{work.images}'\n")
    prompts.write_text("a cat --w 416 --h 64 --s 1 --d 1 --l 1\n", encoding="utf-8")
    options = ["--max_train_steps=1", f"--sample_prompts={prompts}", "--sample_at_first", "--console_log_level=INFO"]
    disk = CASE.caches(on_disk=True)

    def result(name: str, *more: str) -> tuple[dict, bytes]:
        tensors = read_parts(work.train(name, *options, *more, dataset=data))[1]
        return tensors, sample_pictures(tmp_path / name)[0].read_bytes()

    whole, tiled = result("whole", *disk), result("live", "--vae_tiling")
    assert whole[0] != tiled[0] and whole[1] != tiled[1]
    caplog.clear()
    assert result("cached", "--vae_tiling", *disk) == tiled
    assert "encoded in one piece, and now in tiles" in caplog.text
    caplog.clear()
    assert result("again", "--vae_tiling", *disk) == tiled and "encoded in" not in caplog.text
    assert result("whole again", *disk) == whole and "encoded in tiles, and now in one piece" in caplog.text


@pytest.mark.parametrize("mean_flow", [False, True])
def test_a_distilled_model_trains_and_paints(tmp_path: Path, mean_flow: bool, caplog) -> None:
    tiny = build_tiny_hunyuan_image(tmp_path / "tiny", guidance=True, mean_flow=mean_flow)
    work = Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 2), case=CASE)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a cat --w 64 --h 64 --s 2 --d 1 --l 3\na cat --w 64 --h 64 --s 2 --d 1 --l 3 --g 9\n", encoding="utf-8"
    )
    sampling = [
        f"--sample_prompts={prompts}",
        "--sample_every_n_epochs=1",
        "--max_train_epochs=1",
        "--console_log_level=INFO",
    ]
    path = work.train("out", *sampling, *CASE.caches(on_disk=False))
    assert read_parts(path)[0]["ss_guidance_scale"] == "3.5"
    assert len({image.read_bytes() for image in sample_pictures(tmp_path / "out")}) == 2, "the guidance is embedded"
    losses = [losses_of(work.train(f"g{g}", f"--guidance_scale={g}", "--max_train_steps=2")) for g in (1, 9)]
    assert losses[0] != losses[1]
    told = [line for line in caplog.messages if "distilled model" in line]
    assert told and all(("single time" in line) is mean_flow for line in told)


@pytest.mark.parametrize(("keys", "message"), [
    ("resolution = 80\nenable_bucket = false", "80.*32"),
    ("resolution = 64\nbucket_reso_steps = 16\nenable_bucket = true", "bucket_reso_steps.*32"),
])  # fmt: skip
def test_a_size_that_the_autoencoder_cannot_take(work: Work, keys: str, message: str) -> None:
    data = work.folder / "sizes.toml"
    data.write_text(
        f"[[datasets]]\n{keys}\n[[datasets.subsets]]\nimage_dir = '{work.images}'\nnum_repeats = 1\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=message):
        work.train("out", dataset=data)


@pytest.mark.parametrize(("options", "message"), [
    (["--vae_chunk_size=0"], "1 or more"), (["--model_prediction_type=additive"], "use raw"),
    (["--guidance_scale=-1"], "0 or more"),
    (["--weighted_captions"], "no way to weigh words"), (["--blocks_to_swap=1"], "allows at most 0"),
])  # fmt: skip
def test_what_is_refused(work: Work, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        work.train("out", *options)


def test_files_that_do_not_belong_together(work: Work, tmp_path: Path) -> None:
    """A text tower of another width, and the ByT5 of another model, in one message."""
    from library.safetensors_utils import read_header, save_file_atomic
    from library.tiny_models.weights import t5_state

    generator = torch.Generator().manual_seed(1)
    state = {
        key: torch.cat((tensor, tensor), dim=-1) if tensor.ndim == 2 else tensor
        for key, tensor in load_file(work.tiny.text_encoder).items()
    }
    save_file_atomic(state, tmp_path / "wide.safetensors", read_header(work.tiny.text_encoder)[1])
    save_file_atomic(
        t5_state(generator, d_model=8, d_kv=8, heads=2, d_ff=24, layers=1, vocab=384), tmp_path / "b.safetensors"
    )
    with pytest.raises(ConfigError, match=r"--text_encoder .*width is 48.*takes 24") as caught:
        work.train("out", f"--text_encoder={tmp_path / 'wide.safetensors'}", f"--byt5={tmp_path / 'b.safetensors'}")
    assert "--byt5" in str(caught.value) and "its width is 8" in str(caught.value)


def test_files_that_lack_tensors_are_told_at_start(work: Work, tmp_path: Path) -> None:
    """In one message, with what else is wrong; in both layouts of the autoencoder."""
    from library.safetensors_utils import read_header, save_file_atomic

    folder = tmp_path / "folder"
    assert convert_model.main([str(work.tiny.vae), str(folder), "--to", "diffusers"]) == 0
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    cases = {
        "denoiser": (work.tiny.denoiser, "double_blocks.0.img_mlp.fc2.bias"),
        "vae": (work.tiny.vae, "encoder.mid.attn_1.proj_out.bias"),
        "folder": (weights, "decoder.up_blocks.3.conv1.bias"),
    }
    for name, (path, key) in cases.items():
        state = load_file(path)
        del state[key]
        target = path if name == "folder" else tmp_path / f"{name}.safetensors"
        save_file_atomic(state, target, read_header(path)[1])
    found = f"--pretrained_model_name_or_path={tmp_path / 'denoiser.safetensors'}"
    for vae, missing in ((tmp_path / "vae.safetensors", cases["vae"][1]), (folder, "decoder.up.1.block.0.conv1.bias")):
        with pytest.raises(ConfigError) as caught:
            work.train("out", found, f"--vae={vae}")
        assert f"1 keys are missing: {cases['denoiser'][1]}" in str(caught.value)
        assert f"1 keys are missing: {missing}" in str(caught.value)
    assert not (tmp_path / "out").exists()

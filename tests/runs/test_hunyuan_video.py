"""What is special to HunyuanVideo, through the command line: caches of the known tool, first frames, guidance, options,
samples, wrong files. What holds for every family is in test_families.py, for those of clips in test_clips.py."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.hunyuan_video_convert import NAMES
from library.core.errors import ConfigError
from library.hunyuan_video_utils import LAYOUTS, inspect_hunyuan_video
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.tiny_models.hunyuan_video_tiny import TinyHunyuanVideo, build_tiny_hunyuan_video
from library.training import cli
from tests.families import CASES
from tests.runs.clip_work import ClipWork
from tests.runs.conftest import draw_pictures, losses_of, read_parts

CASE = CASES["hunyuan_video"]
@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuanVideo:
    return build_tiny_hunyuan_video(tmp_path_factory.mktemp("tiny_hunyuan_video"))


@pytest.fixture
def work(tmp_path: Path, tiny: TinyHunyuanVideo) -> ClipWork:
    return ClipWork(tmp_path, tiny, draw_pictures(tmp_path / "images", 2), case=CASE)


# -- clips and pictures ------------------------------------------------------------------------------------------------


def as_known_tools_write(path: Path) -> None:
    """A cache file in float16, with no more in its header than the known video tool writes."""
    known = ("architecture", "width", "height", "format_version", "frame_count", "caption1")
    with safe_open(path, "pt") as file:
        header = {name: text for name, text in file.metadata().items() if name in known}
    tensors = load_file(path)
    assert header["architecture"] == "hunyuan_video" and header["format_version"] == "1.0.1"
    halves = {
        key.replace("float32", "float16"): tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
    }
    save_file(halves, path, header)


def test_caches_of_the_known_tool_train(work: ClipWork) -> None:
    """Clips and pictures, without the files that made them."""
    data, options = work.clips(), ["--max_train_steps=4"]
    own = losses_of(work.train("own", *options, *CASE.caches(on_disk=True), dataset=data))
    files = sorted(work.folder.rglob("*_hv*.safetensors"))
    assert len(files) == 3 * 4 + 2 * 2
    for path in files:
        as_known_tools_write(path)
    alone = [
        word for word in work.argv("alone", *options, dataset=data)
        if not word.startswith(("--vae", "--text_encoder", "--live"))
    ]  # fmt: skip
    cli.run(CASE.family, "network", alone)
    assert losses_of(work.folder / "alone" / "lora.safetensors") == pytest.approx(own, rel=1e-2)


def test_samples_are_videos_of_the_asked_size_and_length(work: ClipWork, caplog) -> None:
    prompts = work.folder / "prompts.txt"
    picture = f"--i {work.images}/00.png"
    prompts.write_text(f"a red square --w 64 --h 48 --f 6 --s 2 --d 1\na square --w 64 --h 48 --s 2 --d 1 {picture}\n")
    sampling = [f"--sample_prompts={prompts}", "--sample_at_first", "--max_train_steps=1"]
    made = []
    for name in ("first", "again"):
        work.train(name, *sampling)
        files = sorted((work.folder / name / "sample").glob("*.*"))
        told = [line for line in caplog.messages if "the picture of the sample prompt 'a square' is not used" in line]
        assert len(told) == 1, "once, and not with every sample"
        caplog.clear()
        made.append({path.suffix: path.read_bytes() for path in files if path.suffix in (".mp4", ".avi", ".mkv")})
        (video,) = [path for path in files if path.suffix in (".mp4", ".avi", ".mkv")][:1]
    assert made[0] == made[1], "the same seed makes the same file"
    reader = cv2.VideoCapture(str(video))
    sizes = [int(reader.get(what)) for what in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
    frames = 0
    while reader.read()[0]:
        frames += 1
    assert sizes == [64, 48] and frames == 5 and reader.get(cv2.CAP_PROP_FPS) == pytest.approx(24)


# -- guidance and first frames -----------------------------------------------------------------------------------------


def seen_by_the_denoiser(run, batch) -> tuple[torch.Tensor, dict]:
    """(latents that it is given, its named inputs) in a step."""
    seen = []
    run.models.denoiser.register_forward_pre_hook(
        lambda _, args, named: seen.append((args[0], named)), with_kwargs=True
    )
    run.step(batch, times=torch.full((len(batch),), 0.4))
    return seen[0]


@pytest.mark.parametrize(("options", "expected"), [
    ([], 1000.0), (["--guidance_scale=6"], 6000.0), (["--guidance_scale=6", "--guidance_unscaled"], 6.0),
])  # fmt: skip
def test_the_guidance_reaches_the_model_as_when_sampling(
    work: ClipWork, options: list[str], expected: float, caplog
) -> None:
    with caplog.at_level("INFO"):
        work.trainer("noted", *options).family.check()
    run = work.prepare("out", *options)
    _, named = seen_by_the_denoiser(run, next(run.data.batches(1)))
    assert named["guidance"].tolist() == [expected] * 2
    assert ("--guidance_unscaled" in caplog.text) == (expected >= 1000)
    metadata = run.family.metadata()
    assert metadata["ss_guidance_scale"] == (1.0 if not options else 6.0)


def test_a_model_from_image_to_video_is_shown_the_first_frame(tmp_path: Path, caplog) -> None:
    """In training the clean latents of the first frame and zeros behind them; in samples those of the picture."""
    tiny = build_tiny_hunyuan_video(tmp_path / "tiny", shown=True)
    work = ClipWork(tmp_path, tiny, draw_pictures(tmp_path / "images", 2), case=CASE)
    run = work.prepare("out", *CASE.caches(on_disk=False), dataset=work.clips())
    batch = next(batch for batch in run.data.batches(1) if batch.latents.ndim == 5 and batch.latents.shape[2] == 3)
    given, _ = seen_by_the_denoiser(run, batch)
    clean = batch.latents * 0.476986
    assert given.shape[1] == 32 and torch.equal(given[:, 16:, :1], clean[:, :, :1].to(given))
    assert not given[:, 16:, 1:].any() and not torch.equal(given[:, :16, :1], given[:, 16:, :1])
    prompts = tmp_path / "prompts.txt"
    sampling = [f"--sample_prompts={prompts}", "--sample_at_first", "--max_train_steps=1", "--dit_in_channels=32"]
    pictures = []
    for number in (0, 1):
        prompts.write_text(f"a cat --w 64 --h 64 --s 1 --d 1 --i {work.images}/0{number}.png\n", encoding="utf-8")
        work.train(f"sampled{number}", *sampling)
        pictures.append(sorted((tmp_path / f"sampled{number}" / "sample").glob("*_00_*.png"))[0].read_bytes())
    assert pictures[0] != pictures[1]
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    work.train("without", *sampling)
    assert "the sample prompt 'a cat' has no picture (--i)" in caplog.text and "is left out" in caplog.text


# -- options -----------------------------------------------------------------------------------------------------------

CHANGING = [
    "--timestep_sampling=shift --discrete_flow_shift=7", "--weighting_scheme=sigma_sqrt", "--fp8_scaled", "--fp8_llm",
    "--mixed_precision=bf16 --fp8_base", "--guidance_scale=3", "--guidance_unscaled",
    "--network_args include_patterns=['.*_mod.*']",
]  # fmt: skip
EQUAL = [
    "--sdpa", "--split_attn", "--gradient_checkpointing", "--img_in_txt_in_offloading", "--vae_tiling",
    "--gradient_checkpointing --gradient_checkpointing_cpu_offload", "--vae_chunk_size=2", "--network_train_unet_only",
    "--vae_dtype=fp32 --text_encoder_dtype=fp32 --dit_dtype=fp32", "--vae_spatial_tile_sample_min_size=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny: TinyHunyuanVideo) -> tuple[ClipWork, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("plain")
    base = ClipWork(folder, tiny, draw_pictures(folder / "images", 2), case=CASE)
    return base, load_file(base.train("plain", "--max_train_steps=2"))


def test_what_options_do_to_the_result(plain) -> None:
    base, expected = plain
    for options in (*CHANGING, *EQUAL):
        result = load_file(base.train(options.replace("/", "_"), "--max_train_steps=2", *options.split(" ")))
        if options in CHANGING:
            is_same = set(result) == set(expected) and all(torch.equal(result[key], expected[key]) for key in expected)
            assert not is_same, options
            continue
        for key, tensor in expected.items():
            torch.testing.assert_close(result[key], tensor, rtol=1e-3, atol=1e-5, msg=f"{options} {key}")


def test_layers_and_metadata(plain) -> None:
    base, tensors = plain
    modules = {key.partition(".")[0] for key in tensors}
    assert len(modules) == 8 + 2 * 2 and "lora_unet_double_blocks_0_txt_attn_qkv" in modules
    metadata = read_parts(base.folder / "plain" / "lora.safetensors")[0]
    assert metadata["ss_base_model_version"] == "hunyuan_video" and metadata["ss_discrete_flow_shift"] == "1.0"
    assert metadata["modelspec.architecture"] == "hunyuan-video/lora"


def test_files_of_pytorch_and_folders_of_diffusers_train_the_same(tmp_path: Path) -> None:
    """Files without metadata: what shapes do not tell is that of the released model, or in config.json."""
    tiny = build_tiny_hunyuan_video(tmp_path / "tiny", hidden=64)
    work = ClipWork(tmp_path, tiny, draw_pictures(tmp_path / "images", 2), case=CASE)
    state, vae = (load_safetensors(path, "cpu") for path in (tiny.denoiser, tiny.vae))
    plain, states, autoencoder, folder = (
        tmp_path / name for name in ("plain.safetensors", "states.pt", "vae.pt", "transformer")
    )
    save_file_atomic(state, plain)
    torch.save({"module": state}, states)
    torch.save({"state_dict": {f"vae.{key}": tensor for key, tensor in vae.items()}}, autoencoder)
    folder.mkdir()
    save_file_atomic(NAMES.to_diffusers(state), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(LAYOUTS.config(inspect_hunyuan_video(plain).params)))
    expected = read_parts(work.train("plain", "--max_train_steps=2", f"--dit={plain}"))[1]
    for file in (states, folder, tmp_path):
        assert read_parts(work.train("other", "--max_train_steps=2", f"--dit={file}"))[1] == expected, file
    assert work.trainer("pt", f"--vae={autoencoder}").family.part_problems("vae") == []


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_told_at_once(work: ClipWork, monkeypatch) -> None:
    from library.training.wiring.hunyuan_video import HunyuanVideoFamily

    for name in ("load_vae", "load_text_encoders", "load_denoiser"):
        monkeypatch.setattr(HunyuanVideoFamily, name, lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError) as caught:
        work.train("out", "--dit_in_channels=32", "--blocks_to_swap=9", "--timestep_sampling=nonsense")
    told = "\n".join(caught.value.problems)
    assert "--dit_in_channels is 32, and the file" in told and "has 16 input channels" in told
    assert "--blocks_to_swap is 9; a model with 1 double and 2 single blocks allows at most 0" in told
    for options, message in (
        (["--vae_chunk_size=0"], "--vae_chunk_size is 0; needed: 1 or more"),
        (["--vae_spatial_tile_sample_min_size=100"], "needed: a multiple of 8 and at least 32"),
        (["--text_encoder_dtype=fp8"], "--fp8_llm keeps LLaMA in 8 bits"),
        ([f"--vae={work.tiny.denoiser}"], "needed: a HunyuanVideo autoencoder"),
        ([f"--text_encoder1={work.tiny.text_encoder2}"], "needed: a LLaMA 3 language model"),
    ):
        with pytest.raises(ConfigError) as caught:
            work.train("out", *options)
        assert message in "\n".join(caught.value.problems), options

"""The core of the video scripts, on the toy family: files and their names, latents out and in, prompts, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.generation import video_script
from library.generation.recorded_files import read_file_texts
from library.generation.recorded_requests import ENTRY
from library.generation.video_files import encoder_of, read_video
from tests.planted import plant
from tests.toy_video.record import FAMILY
from tests.toy_video.video_script import ToyScript


@pytest.fixture
def run(monkeypatch, tmp_path):
    plant(monkeypatch, FAMILY)
    monkeypatch.setattr(video_script.time, "time", lambda: 1000000000.123)
    monkeypatch.setattr(video_script.time, "localtime", lambda now: video_script.time.gmtime(now))

    def call(*words: str, folder: str = "out", prompt: bool = True) -> list[Path]:
        asked = ["--prompt=a red cat", "--seed=7"] if prompt else []
        size = ["--video_size", "32", "48", "--fps=12"]
        return ToyScript().run([*asked, *size, f"--save_path={tmp_path / folder}", *words])

    return call


def looked_at(path: Path) -> tuple[float, ...]:
    capture = cv2.VideoCapture(str(path))
    names = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT)
    return tuple(capture.get(name) for name in names)


def test_a_video_has_the_asked_size_rate_and_frames_and_a_seed_gives_equal_bytes(run):
    (path,), (again,), (other,) = run(), run(folder="again"), run("--seed=8", folder="other")
    assert path.name == "20010909-014640-123_0_7.mp4" and looked_at(path) == (48, 32, 12, 5)
    assert path.read_bytes() == again.read_bytes() != other.read_bytes()
    (second,) = run()
    assert second.name == "20010909-014640-123_0_7_2.mp4", "nothing is overwritten"


@pytest.mark.parametrize(
    ("output_type", "names"),
    [
        ("video", {"{}.mp4"}),
        ("images", {"{}"}),
        ("latent", {"{}_latent.safetensors"}),
        ("both", {"{}.mp4", "{}_latent.safetensors"}),
        ("latent_images", {"{}", "{}_latent.safetensors"}),
    ],
)
def test_kinds_of_files(run, tmp_path, output_type, names):
    run(f"--output_type={output_type}", "--negative_prompt=dull", "--guidance_scale=2")
    stem = "20010909-014640-123_0_7"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name.format(stem) for name in names}
    if "{}" in names:
        pictures = sorted((tmp_path / "out" / stem).iterdir())
        assert [path.name for path in pictures] == [f"{stem}_{number:03d}.png" for number in range(5)]
        with Image.open(pictures[4]) as image:
            assert image.size == (48, 32) and image.text["prompt"] == "a red cat"
    if "{}_latent.safetensors" in names:
        with safe_open(tmp_path / "out" / f"{stem}_latent.safetensors", "pt") as file:
            assert file.get_tensor("latent").shape == (4, 3, 4, 6)
            texts = file.metadata()
            assert ENTRY in texts and texts.items() >= {
                "seeds": "7", "prompt": "a red cat", "height": "32", "width": "48", "video_length": "5",
                "infer_steps": "2", "guidance_scale": "2.0", "negative_prompt": "dull",
            }.items()  # fmt: skip


def test_latents_become_the_video_that_was_made_with_them(run, tmp_path, caplog):
    run("--output_type=both")
    (video,) = (tmp_path / "out").glob("*.mp4")
    (latent,) = (tmp_path / "out").glob("*.safetensors")
    caplog.set_level("INFO")
    made = run(f"--latent_path={latent}", "--cfg_apply_ratio=0.5", prompt=False, folder="decoded")
    told = [record.message.split()[0] for record in caplog.records if "nothing is sampled" in record.message]
    assert "--cfg_apply_ratio" in told and "--fps" not in told
    assert [path.name for path in made] == [f"20010909-014640-123_0_7_{latent.stem}.mp4"]
    assert made[0].read_bytes() == video.read_bytes()
    several = run("--latent_path", str(latent), str(latent), "--output_type=images", prompt=False, folder="several")
    assert [path.name for path in several] == [f"20010909-014640-123_{n}_7_{latent.stem}" for n in range(2)]
    bare = tmp_path / "five.safetensors"  # as known scripts write them: [1, C, F, h, w], without metadata
    from safetensors.torch import save_file

    save_file({"latent": load_file(latent)["latent"][None].contiguous()}, bare)
    (again,) = run(f"--latent_path={bare}", prompt=False, folder="bare")
    assert again.name == "20010909-014640-123_0_0_five.mp4"
    assert [f.tobytes() for f in read_video(again)] == [f.tobytes() for f in read_video(video)]


def test_without_metadata_files_tell_nothing(run, tmp_path):
    run("--output_type=latent_images", "--no_metadata")
    for path in (tmp_path / "out").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert not file.metadata()
    assert not any(Image.open(path).text for path in (tmp_path / "out").rglob("*.png"))


def test_each_line_of_a_file_is_a_video_with_its_own_settings(run, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("# two\na red cat --d 7\na dog --w 32 --f 3 --d 9 --s 1 --g 2 --n a cat\n", encoding="utf-8")
    before = ToyScript.encoders_made
    first, second = run(f"--from_file={lines}", prompt=False)
    assert ToyScript.encoders_made == before + 1
    assert [path.name.partition("_")[2] for path in (first, second)] == ["0_7.mp4", "1_9.mp4"]
    assert looked_at(first) == (48, 32, 12, 5) and looked_at(second) == (32, 32, 12, 3)
    (alone,) = run(folder="alone")
    assert alone.read_bytes() == first.read_bytes()


def test_lines_of_one_prompt_keep_their_own_negative_text(run, tmp_path):
    lines = tmp_path / "lines.txt"
    texts = ("dull", "a dog", "dull")
    lines.write_text("".join(f"a red cat --d 7 --g 3 --n {text}\n" for text in texts), encoding="utf-8")
    made = [load_file(path)["latent"] for path in run(f"--from_file={lines}", "--output_type=latent", prompt=False)]
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])


def test_prompts_are_typed(run, monkeypatch, tmp_path):
    typed = iter(["a red cat --d 7", "a dog --q 1", ""])
    monkeypatch.setattr("builtins.input", lambda mark: next(typed))
    (made,) = run("--interactive", prompt=False)
    (alone,) = run(folder="alone")
    assert made.read_bytes() == alone.read_bytes()


def test_typing_uses_prompt_toolkit_where_it_is_there(monkeypatch):
    from types import ModuleType, SimpleNamespace

    from library.generation.script import line_asker

    module = ModuleType("prompt_toolkit")
    module.PromptSession = lambda: SimpleNamespace(prompt=lambda mark: "typed")
    monkeypatch.setitem(sys.modules, "prompt_toolkit", module)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert line_asker()("> ") == "typed"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    assert line_asker() is input


def test_guidance_its_steps_and_blocks_that_are_left_out_change_the_video(run):
    guided = ["--guidance_scale=3", "--negative_prompt=a dog", "--infer_steps=4"]
    ways = {
        "plain": [], "guided": guided, "apart": [*guided, "--split_uncond"],
        "some": [*guided, "--cfg_skip_mode=early", "--cfg_apply_ratio=0.5"],
        "layers": [*guided, "--slg_layers=1", "--slg_mode=uncond"], "shape": ["--infer_steps=4"],
    }  # fmt: skip
    pixels = {}
    for name, words in ways.items():
        (folder,) = run(*words, "--output_type=images", folder=name)
        pixels[name] = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]).astype(int)
    assert np.abs(pixels["guided"] - pixels["apart"]).max() <= 1
    different = [pixels[name] for name in ("shape", "guided", "some", "layers")]
    assert all((a != b).any() for n, a in enumerate(different) for b in different[:n])


def test_blocks_are_compiled(run, monkeypatch):
    from library.training import compilation

    told = []
    monkeypatch.setattr(compilation, "compile_blocks", lambda denoiser, backend, **how: told.append((backend, how)))
    (path,) = run("--compile", "--compile_backend=eager", "--compile_dynamic=false", "--compile_cache_size_limit=9")
    how = {"mode": "default", "dynamic": False, "fullgraph": False, "variants": 9}
    assert told == [("eager", how)] and path.is_file()
    with pytest.raises(ConfigError, match="--compile_backend is none"):
        run("--compile", "--compile_backend=none")


def test_a_video_starts_from_another(run, tmp_path):
    (source,) = run("--output_type=images", folder="source")
    (kept,) = run("--video_path", str(source), "--strength=0.4", "--output_type=latent", folder="kept")  # 0 steps
    (changed,) = run("--video_path", str(source), "--strength=0.6", "--output_type=latent", folder="changed")
    assert not torch.equal(load_file(kept)["latent"], load_file(changed)["latent"])
    lines = tmp_path / "lines.txt"
    lines.write_text(f"a red cat --v {source} --st 0.4 --d 7\n", encoding="utf-8")
    (by_line,) = run(f"--from_file={lines}", "--output_type=latent", prompt=False, folder="line")
    assert torch.equal(load_file(by_line)["latent"], load_file(kept)["latent"])


def test_options_that_change_nothing_are_told(run, caplog, tmp_path):
    words = ["--strength=0.5", "--slg_layers=1", "--cfg_skip_mode=early", "--compile_mode=default", "--negative_prompt=a"]
    run(*words)
    for name, needed in (("strength", "video_path"), ("slg_layers", "slg_mode"), ("compile_mode", "compile")):
        assert f"--{name} has no effect without --{needed}\n" in caplog.text
    assert "--negative_prompt has no effect: --guidance_scale is 1" in caplog.text
    assert "--cfg_skip_mode has no effect without --cfg_apply_ratio" in caplog.text
    run("--cfg_apply_ratio=0.5", "--slg_mode=uncond", "--guidance_scale=2")
    assert "--slg_mode has no effect without --slg_layers" in caplog.text
    assert "--cfg_apply_ratio has no effect without --cfg_skip_mode" in caplog.text
    caplog.clear()
    (tmp_path / "lines.txt").write_text("a red cat\n", encoding="utf-8")
    run("--strength=0.5", f"--from_file={tmp_path / 'lines.txt'}", prompt=False)  # lines may name a --v
    run("--slg_layers=1", "--slg_mode=uncond", "--guidance_scale=2", folder="guided")
    assert "has no effect" not in caplog.text


def test_frames_are_rounded_down_with_a_word(run, caplog):
    (path,) = run("--video_length=6")
    assert looked_at(path)[3] == 5 and "6 frames are asked for; made 5, 2 n + 1" in caplog.text
    (latents,) = run("--video_length=6", "--output_type=latent")
    with safe_open(latents, "pt") as file:
        assert file.metadata()["video_length"] == "5"


def test_problems_are_told_together_before_a_model_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr(ToyScript, "load_encoders", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError) as caught:
        run(
            "--video_size", "8", "32", "--infer_steps=0", "--slg_layers=a,b", "--fps=0",
            "--include_patterns", "a", "b", "--lora_multiplier", "1", "2",
        )  # fmt: skip
    told = "\n".join(caught.value.problems)
    for part in (
        "--video_size is 8 32", "--infer_steps is 0", "--slg_layers is 'a,b'",
        "--fps is 0", "--include_patterns has 2 values for 0 --lora_weight", "--lora_multiplier has 2 values",
    ):
        assert part in told, part
    with pytest.raises(ConfigError, match="--video_path is none.mp4: there is no such file"):
        run("--video_path=none.mp4")
    (tmp_path / "sound.mp4").write_bytes(b"\0" * 100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="--video_path: .*sound.mp4"):
        run(f"--video_path={tmp_path / 'sound.mp4'}")
    with pytest.raises(ConfigError, match="--video_path: .*empty holds no pictures"):
        run(f"--video_path={tmp_path / 'empty'}")
    with pytest.raises(ConfigError, match="--save_path is not given; needed: the folder for the videos"):
        ToyScript().run(["--prompt=a"])
    with pytest.raises(ConfigError, match="--save_path is .*sound.mp4; files cannot be written there"):
        run(folder="sound.mp4")
    with pytest.raises(ConfigError, match="use --output_type video or images"):
        run("--latent_path=x", "--output_type=both", prompt=False)


def test_patterns_belong_to_files_by_their_place():
    from library.generation.adapter_files import LayerFilter
    from library.generation.video_options import VideoAdapterOptions

    options = VideoAdapterOptions(
        lora_weight=["a", "b"], include_patterns=["attn", "mlp"], exclude_patterns=["norm"]
    )
    assert [file.layer_filter for file in options.files] == [
        LayerFilter(("attn",), ("norm",)),
        LayerFilter(("mlp",), ("norm",)),
    ]
    assert [file.multiplier for file in options.files] == [1.0, 1.0] and options.adapters.merged
    assert not VideoAdapterOptions(lora_weight=["a"], lycoris=True).adapters.merged


def test_a_video_of_every_kind_is_made_again_of_what_it_tells(run, tmp_path, caplog):
    lines = tmp_path / "lines.txt"
    lines.write_text("a 日本 cat --w 32 --f 3 --d 9 --s 1 --g 2 --n a dog\n", encoding="utf-8")
    kinds = [
        (["--codec=prores"], ".mkv"), (["--codec=h265", "--keep_pngs", "--image_format=webp"], ".mp4"),
        (["--codec=h264", "--container=mov"], ".mov"), (["--container=webm"], ".webm"), ([], ".mp4"),
    ]  # fmt: skip
    for number, (words, ending) in enumerate(kinds):
        (made,) = run(*words, f"--from_file={lines}", prompt=False, folder=f"first{number}")
        folder = f"--save_path={tmp_path / f'again{number}'}"
        (again,) = ToyScript().run([f"--from_metadata={made}", folder, *words[1:2]])
        assert made.suffix == ending and made.read_bytes() == again.read_bytes(), words
        told = read_file_texts(made)
        assert told["prompt"] == "a 日本 cat" and json.loads(told[ENTRY])["options"]["video_size"] == [32, 32]
        frames = sorted(made.with_suffix("").glob("*"))
        assert [frame.suffix for frame in frames] == [".webp"] * 3 * ("--keep_pngs" in words)
    assert "--codec prores: mkv files, as mp4 has none" in caplog.text
    (bare,) = run("--no-metadata", "--output_type=video", folder="bare")
    assert not read_file_texts(bare)
    (latent,) = run("--output_type=latent", f"--from_file={lines}", prompt=False, folder="latent")
    (again,) = ToyScript().run([f"--from_metadata={latent}", f"--save_path={tmp_path / 'a'}", "--output_type=latent"])
    assert again.read_bytes() == latent.read_bytes()


def test_codecs_that_files_cannot_hold_are_refused_and_those_without_a_video_are_told(run, caplog, monkeypatch):
    with pytest.raises(ConfigError, match="--codec is h265: h265 is written into files that end in .mp4, .mov, .mkv"):
        run("--codec=h265", "--container=webm")
    run("--codec=h265", "--keep_pngs", "--output_type=images")
    run("--image_format=webp")
    assert "--image_format has no effect: no pictures are written" in caplog.text
    with pytest.raises(ConfigError, match="leave out --from_metadata"):
        run("--latent_path=a.safetensors", f"--from_metadata={run()[0]}", prompt=False)
    assert "--codec has no effect" in caplog.text and "--keep_pngs has no effect" in caplog.text
    monkeypatch.setattr("library.generation.video_files.has_pyav", lambda: False)
    encoder_of.cache_clear()
    try:
        with pytest.raises(ConfigError, match="--codec is h264: h264 is written by PyAV, which is not installed"):
            run("--codec=h264")
        run()
        assert "settings are not written into video files by OpenCV" in caplog.text
    finally:
        encoder_of.cache_clear()

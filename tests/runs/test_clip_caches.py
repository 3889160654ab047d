"""Caches of videos beside a run: made by the tools, or by the rules of the known format in the tests, they are all
that a run needs; what is wrong with them is told with its reason before a model is loaded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.dataset.tensor_cache_io import TensorFile
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.tiny_models.framepack_tiny import build_tiny_framepack
from library.tiny_models.hunyuan_video_tiny import TinyHunyuanVideo, build_tiny_hunyuan_video
from library.tiny_models.wan_tiny import build_tiny_wan
from library.training import cache_tools, cli
from tests.musubi import known_options
from tests.option_sets import frozen_tool_path, option_set
from tests.library.dataset.clips.videos import write_video
from tests.runs.conftest import fingerprint, largest_difference
from tests.runs.families import refused_run, without

DATA = """
[general]
resolution = [64, 32]
batch_size = 2
caption_extension = ".txt"
enable_bucket = true
[[datasets]]
video_directory = '{videos}'
cache_directory = '{caches}'
target_frames = [{frames}]
frame_extraction = "chunk"
"""
CAPTIONS = {"a": "a red cat", "b": "a dog runs\nsecond line, \u732b"}


class ClipWork:
    """Two videos of ten frames, 128x64, of which each gives two clips of five."""

    def __init__(self, folder: Path, tiny: TinyHunyuanVideo) -> None:
        self.folder, self.tiny, self.caches = folder, tiny, folder / "caches"
        for first, (name, caption) in enumerate(CAPTIONS.items()):
            write_video(folder / "videos" / f"{name}.avi", 10, size=(128, 64), first=10 * first)
            (folder / "videos" / f"{name}.txt").write_text(caption, encoding="utf-8")

    def data(self, frames: int = 5, more: str = "") -> str:
        path = self.folder / f"data{frames}.toml"
        text = DATA.format(videos=self.folder / "videos", caches=self.caches, frames=frames) + more
        path.write_text(text, encoding="utf-8")
        return f"--dataset_config={path}"

    def argv(self, out: str, frames: int = 5) -> list[str]:
        """Of a run without VAE and text encoders."""
        return [
            f"--dit={self.tiny.denoiser}", self.data(frames), f"--output_dir={self.folder / out}", "--output_name=lora",
            "--network_module=networks.lora", "--network_dim=4", "--max_train_steps=2", "--seed=5",
            "--max_data_loader_n_workers=0", "--learning_rate=1e-2", "--console_log_level=WARNING",
        ]  # fmt: skip

    def train(self, out: str) -> Path:
        cli.run("hunyuan_video", "network", self.argv(out))
        return self.folder / out / "lora.safetensors"

    def tool(self, what: str, *options: str) -> None:
        names = ("--vae=",) if what == "latents" else ("--text_encoder",)
        files = [word for word in self.tiny.arguments() if word.startswith(names)]
        cache_tools.run(what, ["--family=hunyuan_video", self.data(), *files, *options])

    def names(self) -> list[str]:
        return sorted(path.name for path in self.caches.glob("*.safetensors"))

    def write_known(self) -> None:
        """Caches by the rules of the known format: the size that frames are read in in the name, float16."""
        generator = torch.Generator().manual_seed(3)
        self.caches.mkdir(exist_ok=True)
        for name, caption in CAPTIONS.items():
            for start in (0, 5):
                latents = torch.randn(16, 2, 4, 8, generator=generator).half()
                path = self.caches / f"{name}_{start:05d}-005_0064x0032_hv.safetensors"
                save_file_atomic(
                    {"latents_2x4x8_float16": latents}, path,
                    {"architecture": "hunyuan_video", "width": "64", "height": "32", "format_version": "1.0.1",
                     "frame_count": "5"},
                )  # fmt: skip
            text = {
                "llm_float16": torch.randn(256, 24, generator=generator).half(),
                "llm_mask": (torch.arange(256) < 9).long(),
                "clipL_float16": torch.randn(16, generator=generator).half(),
                "clipL_mask": torch.ones(77, dtype=torch.int64),
            }  # fmt: skip
            header = {"architecture": "hunyuan_video", "caption1": caption, "format_version": "1.0.1"}
            save_file_atomic(text, self.caches / f"{name}_hv_te.safetensors", header)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyHunyuanVideo:
    return build_tiny_hunyuan_video(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def work(tiny, tmp_path) -> ClipWork:
    return ClipWork(tmp_path, tiny)


CLIPS = [f"{name}_{start:05d}-005_0128x0064_hv.safetensors" for name in CAPTIONS for start in (0, 5)]


def test_a_run_needs_no_more_than_what_the_tools_made(work, caplog, monkeypatch, capsys):
    """However the VAE computed them. Captions are counted by video, latents by clip."""
    message = refused_run("hunyuan_video", work.argv("lacking"), monkeypatch, capsys)
    assert "4 samples have no latents" in message and "2 captions have no text encoder outputs" in message
    caplog.set_level("INFO")
    work.tool("latents", "--vae_dtype=fp16", "--batch_size=2", "--vae_spatial_tile_sample_min_size=32")
    assert work.names() == CLIPS
    with safe_open(work.caches / CLIPS[0], "pt") as file:
        header = file.metadata()
    told = {"architecture": "hunyuan_video", "width": "128", "height": "64", "format_version": "1.0.1"}
    assert header == told | {"frame_count": "5", "atelier_record": header["atelier_record"]}
    latents = load_safetensors(work.caches / CLIPS[0])
    assert {key: list(tensor.shape) for key, tensor in latents.items()} == {"latents_2x4x8_float16": [16, 2, 4, 8]}
    work.tool("text", "--text_encoder_dtype=bf16")
    assert "0 clips cached, 4 to encode" in caplog.text and "0 captions cached, 2 to encode" in caplog.text
    assert work.names() == sorted([*CLIPS, "a_hv_te.safetensors", "b_hv_te.safetensors"])
    text = load_safetensors(work.caches / "a_hv_te.safetensors")
    assert sorted(text) == ["clipL_bfloat16", "clipL_mask", "llm_bfloat16", "llm_mask"]
    assert list(text["llm_bfloat16"].shape) == [256, 24] and list(text["clipL_bfloat16"].shape) == [16]
    before = {path: path.stat().st_mtime_ns for path in work.caches.glob("*.safetensors")}
    assert fingerprint(work.train("one")) == fingerprint(work.train("two"))
    assert before == {path: path.stat().st_mtime_ns for path in work.caches.glob("*.safetensors")}


def test_caches_of_the_known_trainer_train(work):
    """Each of their numbers is learned from, and none of the files is touched."""
    work.write_known()
    before = {path: path.read_bytes() for path in work.caches.glob("*.safetensors")}
    first = work.train("one")
    assert {path: path.read_bytes() for path in work.caches.glob("*.safetensors")} == before
    for name in ("a_00000-005_0064x0032_hv", "a_hv_te"):
        path = work.caches / f"{name}.safetensors"
        key = "latents_2x4x8_float16" if "-005" in name else "llm_float16"
        tensors = load_safetensors(path)
        header = {"architecture": "hunyuan_video"} | ({"caption1": CAPTIONS["a"]} if "te" in name else {})
        save_file_atomic(tensors | {key: -tensors[key]}, path, header)
        assert largest_difference(first, work.train(name)) > 1e-7
        path.write_bytes(before[path])


def test_caches_that_do_not_fit_are_told_with_the_reason(work, monkeypatch, capsys):
    """Other frames, another caption, NaN: one message names the tools, before a model is loaded."""
    work.write_known()
    message = refused_run("hunyuan_video", work.argv("out", frames=9), monkeypatch, capsys)
    assert "no file" in message and "tools/cache_latents.py --family hunyuan_video" in message
    for path in list(work.caches.glob("*-005_*")):
        path.rename(path.with_name(path.name.replace("-005_", "-009_")))
    message = refused_run("hunyuan_video", work.argv("out", frames=9), monkeypatch, capsys)
    assert "made of 5 frames, and now 9" in message
    work.write_known()
    path = work.caches / "a_00000-005_0064x0032_hv.safetensors"
    tensors = load_safetensors(path)
    save_file_atomic({key: tensor * float("nan") for key, tensor in tensors.items()}, path)
    (work.folder / "videos" / "b.txt").write_text("another caption", encoding="utf-8")
    message = refused_run("hunyuan_video", work.argv("out"), monkeypatch, capsys)
    assert "1024 of 1024 numbers are NaN in latents" in message and "made with another caption" in message
    assert "tools/cache_text_encoder_outputs.py" in message


KNOWN_TOOLS = {
    "hv_cache_latents": "cache_latents.py", "hv_cache_text_encoder_outputs": "cache_text_encoder_outputs.py",
    **{name: f"{name}.py" for name in ("wan_cache_latents", "wan_cache_text_encoder_outputs")},
    **{name: f"{name}.py" for name in ("fpack_cache_latents", "fpack_cache_text_encoder_outputs")},
}
"""our names -> those of the video tool"""
REQUIRED = {"latents": {"vae", "image_encoder"}, "text": {"text_encoder1", "text_encoder2", "t5"}}
"""options that name files of models"""


def what_of(name: str) -> str:
    return "latents" if name.endswith("latents") else "text"


@pytest.mark.parametrize("name", KNOWN_TOOLS)
def test_the_known_names_of_the_tools_take_their_options(name, work, capsys):
    """Each works, or is answered with a reason; files that are needed and not given are told together."""
    module, what = importlib.import_module(f"tools.{name}"), what_of(name)
    tool = cache_tools.tool_script(module.FAMILY, what)
    known = known_options(KNOWN_TOOLS[name])
    for option in known:
        assert option["dest"] in tool.owners, option["dest"]
        status = tool.status(option["dest"])
        assert status in ("works", "equivalent"), (option["dest"], status)
        assert status == "works" or tool.reason(option["dest"])
    with pytest.raises(SystemExit) as ended:
        cache_tools.main(what, [work.data()], family=module.FAMILY)
    error = capsys.readouterr().err
    wanted = REQUIRED[what] & {option["dest"] for option in known}
    assert ended.value.code == 2 and [option for option in wanted if f"--{option} is not given" not in error] == []
    assert module.setup_parser().parse_args(["--keep_cache"]).keep_cache


@pytest.mark.parametrize("name", KNOWN_TOOLS)
def test_their_options_are_the_frozen_ones(name):
    """A change that is meant: `python -m tests.option_sets`, and look at the difference."""
    family = importlib.import_module(f"tools.{name}").FAMILY
    frozen = json.loads(frozen_tool_path(family, what_of(name)).read_text(encoding="utf-8"))
    assert option_set(cache_tools.tool_script(family, what_of(name))) == frozen


CONDITIONS = {
    "t2v-14B": ([], {"latents"}),
    "i2v-A14B": (["--i2v"], {"latents", "latents_image"}),
}
"""task -> options of the known tool that make its caches, names of what these hold"""


@pytest.mark.parametrize("task", CONDITIONS)
def test_caches_of_wan_by_the_options_of_its_tool(task, work, tmp_path):
    """What a task is conditioned on is in the files, and with the text they are all that a run needs."""
    tiny = build_tiny_wan(tmp_path / "tiny", task=task)
    options, names = CONDITIONS[task]
    cache_tools.run("latents", ["--family=wan", work.data(), f"--vae={tiny.vae}", *options])
    file = TensorFile.of(str(work.caches / CLIPS[0].replace("_hv.", "_wan.")))
    assert set(file.keys) == names and file.keys["latents"] == "latents_2x4x8_bfloat16"
    cache_tools.run("text", ["--family=wan", work.data(), f"--t5={tiny.t5}", f"--t5_tokenizer={tiny.tokenizer}"])
    text = TensorFile.of(str(work.caches / "a_wan_te.safetensors"))
    assert list(text.keys.values()) == ["varlen_t5_bfloat16"]
    argv = without(work.argv("out"), "dit", "network_module")
    denoisers = [f"--dit={tiny.denoiser}"] + ([f"--dit_high_noise={tiny.high}"] if tiny.high else [])
    cli.run("wan", "network", [*argv, *denoisers, "--network_module=networks.lora_wan", f"--task={task}"])
    assert (work.folder / "out" / "lora.safetensors").exists()


def test_sections_of_framepack_by_the_options_of_its_tool(work, tmp_path, monkeypatch, capsys):
    """Each section of a clip has a file; sections that see those before them are others."""
    tiny = build_tiny_framepack(tmp_path / "tiny")
    data = work.data(9, "fp_latent_window_size = 1\n")
    files = [word for word in tiny.arguments() if word.startswith(("--vae", "--image_encoder"))]
    cache_tools.run("latents", ["--family=framepack", data, *files, "--vae_dtype=fp32"])
    assert work.names() == [f"{name}_00000-009-000{n}_0128x0064_fp.safetensors" for name in CAPTIONS for n in (0, 1)]
    file = TensorFile.of(str(work.caches / work.names()[0]))
    assert file.keys["latents_clean_2x"] == "latents_clean_2x_1x4x8_float32" and file.metadata["frame_count"] == "9"
    texts = [word for word in tiny.arguments() if word.startswith("--text_encoder")]
    cache_tools.run("text", ["--family=framepack", data, *texts])
    argv = without(work.argv("out"), "dit", "network_module", "dataset_config")
    argv += [f"--dit={tiny.denoiser}", data, "--network_module=networks.lora_framepack"]
    cli.run("framepack", "network", argv)
    message = refused_run("framepack", [*argv, "--output_dir=" + str(tmp_path / "f1"), "--f1"], monkeypatch, capsys)
    assert "encoded sections of 1, and now sections of 1 seen forwards" in message

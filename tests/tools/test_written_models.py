"""What the model tools write is a model: it trains one step and makes one picture, as the model that it was made of
does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.checkpoints.flux_convert import convert_bfl_sd_to_diffusers
from library.generation import flux_inference
from library.generation.gen_img import script as unet_inference
from library.safetensors_utils import load_safetensors, read_header
from library.training import cli
from tests.runs.conftest import draw_pictures, largest_difference
from tests.tiny import build_tiny_flux
from tests.tiny_sd import TinySd, build_tiny_sd
from tools import convert_model, merge_lora, merge_models

FLAGS = {"sd1": [], "sd2": ["--v2"], "sdxl": ["--sdxl"]}


class Bench:
    """One kind of U-Net model: trains an adapter on a model file or folder, and makes a picture with it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.tiny: TinySd = build_tiny_sd(folder / "model", kind, num_res_blocks=2)
        tensors = load_file(self.tiny.model) | {
            "model_ema.decay": torch.ones(()),
            "betas": torch.rand(5),
        }  # real files hold such as well
        save_file(tensors, self.tiny.model, read_header(self.tiny.model)[1])
        self.adapter = self.train(self.tiny.model, "adapter")

    def train(self, model: Path, out: str) -> Path:
        tiny = replace(self.tiny, model=model)
        family = "sdxl" if self.kind == "sdxl" else "sd"
        cli.run(family, "network", [
            *tiny.arguments(), f"--train_data_dir={self.folder / 'data'}", f"--output_dir={self.folder / out}",
            "--output_name=lora",
            "--resolution=64", "--network_module=lora", "--network_dim=2", "--network_alpha=2", "--max_train_steps=1",
            "--optimizer_type=SGD", "--learning_rate=1",
            "--seed=1", "--max_data_loader_n_workers=0", "--console_log_level=WARNING",
        ])  # fmt: skip
        return self.folder / out / "lora.safetensors"

    def picture(self, model: Path, out: str) -> Image.Image:
        (path,) = unet_inference.run([
            f"--ckpt={model}", f"--clip_tokenizer={self.tiny.tokenizer}", f"--outdir={self.folder / out}", "--W=64",
            "--H=64", "--steps=2",
            "--prompt=a cat", "--seed=1", *FLAGS[self.kind],
        ])  # fmt: skip
        return Image.open(path).convert("RGB")

    def is_like_the_original(self, model: Path, name: str) -> None:
        assert largest_difference(self.train(model, f"train {name}"), self.adapter) < 1e-5
        ours, theirs = (self.picture(path, f"picture {name}") for path in (model, self.tiny.model))
        assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)) <= 1


@pytest.fixture(scope="module", params=FLAGS)
def bench(request, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "data").mkdir()
    draw_pictures(folder / "data" / "1_cat", 2)
    return Bench(request.param, folder)


def test_a_folder_of_the_converter_with_files_beside_its_index(bench: Bench) -> None:
    """`original_rest.safetensors` is one, an adapter that somebody keeps there another."""
    folder = bench.folder / "pipeline"
    words = [str(bench.tiny.model), str(folder), "--to", "diffusers", "--tokenizer", str(bench.tiny.tokenizer)]
    assert convert_model.main(words) == 0 and (folder / "original_rest.safetensors").is_file()
    bench.is_like_the_original(folder, "folder")
    assert convert_model.main([str(folder), str(bench.folder / "back.safetensors"), "--to", "single"]) == 0
    bench.is_like_the_original(bench.folder / "back.safetensors", "back")
    shutil.copy(bench.adapter, folder / "my_adapter.safetensors")
    (folder / "original_rest.safetensors").unlink()
    bench.is_like_the_original(folder, "folder with adapter")


def test_a_sum_of_models_and_a_model_with_an_adapter(bench: Bench) -> None:
    if bench.kind == "sd2":
        pytest.skip("a file like that of Stable Diffusion 1")
    total, merged = bench.folder / "sum.safetensors", bench.folder / "merged.safetensors"
    assert merge_models.main(["--models", str(bench.tiny.model), str(bench.tiny.model), "--output", str(total)]) == 0
    bench.is_like_the_original(total, "sum")
    words = [
        "--model",
        str(bench.tiny.model),
        "--models",
        str(bench.adapter),
        "--ratios",
        "0",
        "--save_to",
        str(merged),
    ]
    assert merge_lora.main(words) == 0
    bench.is_like_the_original(merged, "merged")


def test_flux_of_shards_trains_and_paints(tmp_path) -> None:
    tiny = build_tiny_flux(tmp_path / "tiny")
    state = {
        key: tensor.contiguous() for key, tensor in convert_bfl_sd_to_diffusers(load_safetensors(tiny.flux)).items()
    }
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors", read_header(tiny.flux)[1])
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}), encoding="utf-8")
    shutil.copy(tiny.ae, folder / "ae.safetensors")  # as the published repositories have it
    single = tmp_path / "single.safetensors"
    assert convert_model.main([str(folder), str(single), "--to", "single"]) == 0
    draw_pictures(tmp_path / "data" / "1_cat", 2)
    trained, painted = [], []
    for number, model in enumerate((tiny.flux, single, folder)):
        words = [word for word in tiny.arguments() if not word.startswith("--pretrained_model_name_or_path")]
        out = tmp_path / f"out {number}"
        cli.run("flux", "network", [
            *words, f"--pretrained_model_name_or_path={model}", f"--train_data_dir={tmp_path / 'data'}",
            f"--output_dir={out}", "--output_name=lora",
            "--resolution=64", "--network_module=lora", "--network_dim=2", "--network_alpha=2", "--max_train_steps=1",
            "--optimizer_type=SGD", "--learning_rate=1",
            "--seed=1", "--max_data_loader_n_workers=0", "--console_log_level=WARNING",
        ])  # fmt: skip
        trained.append(out / "lora.safetensors")
        (path,) = flux_inference.run([
            f"--ckpt_path={model}", f"--ae={tiny.ae}", f"--clip_l={tiny.clip_l}", f"--t5xxl={tiny.t5xxl}",
            f"--clip_l_tokenizer={tiny.clip_l_tokenizer}",
            "--t5xxl_max_token_length=16", "--dtype=float32", "--width=64", "--height=32", "--steps=2", "--seed=1",
            f"--output_dir={out}",
        ])  # fmt: skip
        painted.append(Image.open(path).tobytes())
    assert max(largest_difference(trained[0], other) for other in trained[1:]) < 1e-5 and len(set(painted)) == 1

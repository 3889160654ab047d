"""Diffusers pipeline folders and .ckpt files of Stable Diffusion 1, 2 and SDXL through the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import UnsupportedCombination
from library.training import cli
from library.training.run import Models
from tests.runs.conftest import draw_pictures, largest_difference, read_parts
from tests.families import CASES
from tests.runs.families import FamilyWork, refused_run, without
from tests.tiny import KINDS, write_clip_tokenizer

diffusers = pytest.importorskip("diffusers")
LEFT_AS_IT_WAS = 20
"""most tensors of a text encoder that are in the file and in no module: a layer that is not used, the logit scale"""
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@dataclass(frozen=True)
class FolderModel:
    """A pipeline folder or a file with its tokenizer, in the place of a tiny set."""

    folder: Path
    model: Path
    tokenizer: Path
    is_v2: bool

    def arguments(self) -> list[str]:
        words = [f"--pretrained_model_name_or_path={self.model}", f"--clip_tokenizer={self.tokenizer}"]
        return [*words, *(["--v2"] if self.is_v2 else [])]


def work_with(folder: Path, model: Path, kind: str, script: str) -> FamilyWork:
    """A run of the script of `script` (a tiny set) on a model folder of a kind; epsilon prediction."""
    tiny = FolderModel(folder, model, model / "tokenizer", kind == "sd2")
    case = replace(CASES[script], name="sd1" if script == "sd2" else script)
    return FamilyWork(folder, tiny, draw_pictures(folder / "images", 3), case=case)


def unet(kind: str) -> Any:
    """64 values wide, so that the single file, which has no config beside it, tells the number of heads too."""
    is_xl = kind == "sdxl"
    heads = 8 if kind == "sd1" else [1, 1]
    more: dict[str, Any] = {
        "attention_head_dim": heads,
        "use_linear_projection": kind != "sd1",
        "upcast_attention": kind == "sd2",
    }
    if is_xl:
        more |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "transformer_layers_per_block": [1, 2],
                 "projection_class_embeddings_input_dim": 64 + 6 * 256}  # fmt: skip
    down = ("DownBlock2D", "CrossAttnDownBlock2D") if is_xl else ("CrossAttnDownBlock2D", "DownBlock2D")
    up = ("CrossAttnUpBlock2D", "UpBlock2D") if is_xl else ("UpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 64), layers_per_block=1, down_block_types=down, up_block_types=up,
        cross_attention_dim=128 if is_xl else 64, **more,
    )  # fmt: skip


def text_encoder(vocab: int, act: str, is_projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1,
        hidden_act=act,
        projection_dim=64, bos_token_id=vocab - 2, eos_token_id=vocab - 1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if is_projected else CLIPTextModel)(config)


def write_folder(folder: Path, kind: str, prediction: str = "epsilon") -> Path:
    """What `save_pretrained` of a pipeline writes: parts in sub-folders, model_index.json."""
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, latent_channels=4, norm_num_groups=32,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_clip_tokenizer(folder / "tokenizer")
    act = "quick_gelu" if kind == "sd1" or kind == "sdxl" else "gelu"
    text_encoder(vocab, act, False).save_pretrained(folder / "text_encoder")
    if kind == "sdxl":
        text_encoder(vocab, "gelu", True).save_pretrained(folder / "text_encoder_2")
    unet(kind).save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    diffusers.DDIMScheduler(prediction_type=prediction).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[kind]}), encoding="utf-8")
    return folder


def write_single_file(folder: Path, kind: str, path: Path) -> Path:
    """The same weights as one file in the original layout."""
    from library import sd_utils, sdxl_utils

    place = (folder, torch.float32, "cpu")
    if kind == "sdxl":
        parts = (
            sdxl_utils.load_unet_sdxl(*place),
            sdxl_utils.load_text_encoders_sdxl(*place),
            sdxl_utils.load_vae_sdxl(*place),
        )
        sdxl_utils.save_checkpoint_sdxl(path, *parts)
    else:
        is_v2 = kind == "sd2"
        parts = (
            sd_utils.load_unet_sd(*place),
            sd_utils.load_text_encoder_sd(folder, is_v2, *place[1:]),
            sd_utils.load_vae_sd(*place),
        )
        sd_utils.save_checkpoint_sd(path, *parts, is_v2=is_v2)
    return path


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("folders")
    return request.param, write_folder(folder / request.param, request.param)


@pytest.fixture
def work(model: tuple[str, Path], tmp_path: Path) -> FamilyWork:
    kind, folder = model
    return work_with(tmp_path, folder, kind, kind)


def train(work: FamilyWork, out: str, path: Path, *more: str) -> Path:
    tiny = work.tiny
    work.tiny = replace(tiny, model=path)
    try:
        return work.train(out, "--max_train_steps=2", *more)
    finally:
        work.tiny = tiny


def test_a_folder_a_file_and_a_ckpt_train_the_same_adapter(model: tuple[str, Path], work: FamilyWork) -> None:
    kind, folder = model
    file = write_single_file(folder, kind, work.folder / "model.safetensors")
    state = load_file(file)
    torch.save({"state_dict": state, "global_step": 3, "callbacks": {"none": None}}, work.folder / "model.ckpt")
    torch.save(state, work.folder / "flat.ckpt")
    shutil.copy(file, work.folder / "renamed.ckpt")
    from_folder = train(work, "folder", folder)
    for name in ("model.safetensors", "model.ckpt", "flat.ckpt", "renamed.ckpt"):
        trained = train(work, f"out {name}", work.folder / name)
        assert largest_difference(trained, from_folder) < 1e-4, (
            name
        )  # weights of a file may lie at odd places in memory
    named = read_parts(from_folder)[0]
    assert named["ss_sd_model_name"] == kind and named["ss_sd_model_hash"] == "IsADirectory"
    assert read_parts(trained)[0]["ss_sd_model_name"] == "renamed.ckpt"


def test_a_model_that_has_learned_is_one_file(model: tuple[str, Path], work: FamilyWork) -> None:
    """Of a folder in the original layout, of a file in its own; parts that have not learned are those of the base."""
    kind, folder = model
    single = write_single_file(folder, kind, work.folder / "single.safetensors")
    whole = load_file(single)
    for path in (folder, single):
        work.tiny = replace(work.tiny, model=path)
        family = work.trainer("out").family
        models = Models(None, family.base_text_encoders(), family.base_denoiser().requires_grad_(False))
        for part in (models.denoiser, *models.text_encoders):
            for parameter in part.parameters():
                parameter.data += 1
        for parts, prefixes in (
            (("denoiser",), ("model.",)), (("denoiser", "text_encoders"), ("model.", "cond", "text_projection")),
        ):
            family.save_model(models, str(work.folder / "made.safetensors"), None, {"a": "b"}, parts)
            made = load_file(work.folder / "made.safetensors")
            assert made.keys() == whole.keys()
            changed = {key for key in made if not torch.equal(made[key], whole[key])}
            own = {key for key in made if key.startswith(prefixes) and made[key].is_floating_point()}
            assert changed <= own and len(changed) >= len(own) - LEFT_AS_IT_WAS, (path, parts, sorted(changed ^ own))
    with pytest.raises(UnsupportedCombination, match="vision cannot"):
        family.save_model(models, str(work.folder / "made.safetensors"), None, {}, ("denoiser", "vision"))


def test_a_folder_of_pickles(model: tuple[str, Path], work: FamilyWork) -> None:
    """Old folders hold .bin files."""
    _, folder = model
    old = shutil.copytree(folder, work.folder / "old")
    for path in list(old.rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.name == "model.safetensors" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    assert largest_difference(train(work, "new", folder), train(work, "old_out", old)) < 1e-4


def test_the_name_of_a_folder_with_a_slash(model: tuple[str, Path], work: FamilyWork) -> None:
    kind, folder = model
    argv = without(work.argv("out", "--max_train_steps=1"), "pretrained_model_name_or_path")
    cli.run(work.family, "network", [*argv, f"--pretrained_model_name_or_path={folder}/"])
    assert read_parts(work.folder / "out" / "lora.safetensors")[0]["ss_sd_model_name"] == kind


def test_caches_of_a_folder_belong_to_its_autoencoder(model: tuple[str, Path], work: FamilyWork, caplog) -> None:
    """Another U-Net in the folder leaves the caches valid, another autoencoder does not."""
    _, folder = model
    mine = shutil.copytree(folder, work.folder / "mine")
    train(work, "first", mine, "--cache_latents_to_disk")
    caches = {path: path.stat().st_mtime_ns for path in work.images.glob("*.npz")}
    weights = mine / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import save_file

    save_file({key: tensor * 1.01 for key, tensor in load_file(weights).items()}, weights)
    train(work, "second", mine, "--cache_latents_to_disk")
    assert caches == {path: path.stat().st_mtime_ns for path in work.images.glob("*.npz")} and caches
    weights = mine / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 1.01 for key, tensor in load_file(weights).items()}, weights)
    train(work, "third", mine, "--cache_latents_to_disk")
    assert all(path.stat().st_mtime_ns > time for path, time in caches.items())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "weights"])
def test_a_folder_with_a_missing_part(
    model: tuple[str, Path], work: FamilyWork, part: str, monkeypatch, capsys
) -> None:
    kind, folder = model
    if part == "text_encoder_2" and kind != "sdxl":
        pytest.skip("it has one text encoder")
    broken = shutil.copytree(folder, work.folder / "broken")
    if part == "weights":
        (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    else:
        shutil.rmtree(broken / part)
    argv = without(work.argv("out"), "pretrained_model_name_or_path")
    message = refused_run(work.family, [*argv, f"--pretrained_model_name_or_path={broken}"], monkeypatch, capsys)
    (line,) = [line for line in message.splitlines() if "--pretrained_model_name_or_path is" in line]
    assert ("unet" if part == "weights" else part) in line


def test_a_folder_that_says_velocity(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = write_folder(tmp_path / "v", "sd2", prediction="v_prediction")
    work = work_with(tmp_path, folder, "sd2", "sd2")
    message = refused_run("sd", work.argv("out"), monkeypatch, capsys)
    assert "says that it predicts velocity; add --v_parameterization" in message
    assert read_parts(train(work, "out", folder, "--v_parameterization"))[0]["ss_base_model_version"] == "sd_v2_v"
    other = work_with(tmp_path, folder, "sd1", "sdxl")
    message = refused_run("sdxl", other.argv("other"), monkeypatch, capsys)
    assert (
        "a diffusers pipeline folder (StableDiffusionPipeline)" in message
        and "train_network.py trains such a model" in message
    )

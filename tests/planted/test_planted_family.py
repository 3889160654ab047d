"""A family of a package outside the tree trains, caches, samples, resumes and has its adapters converted through the
command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.families import registry
from library.families.record import FamilyRecord
from library.training import cli
from tests.planted import plant
from tests.runs.conftest import DATASET, draw_pictures, read_parts

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent / "pastel"
STEPS = 4


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of installed packages with the family and what its installation says of it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(SOURCE, folder / "pastel", ignore=shutil.ignore_patterns("__pycache__"))
    about = folder / "pastel-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pastel\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text("[atelier.families]\npastel = pastel.record:FAMILY\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def work(site, tmp_path_factory) -> Path:
    """The tiny files, which `make_tiny_checkpoint.py` makes, pictures and a dataset configuration."""
    folder = tmp_path_factory.mktemp("planted")
    command(
        site, folder, str(ROOT / "tools" / "make_tiny_checkpoint.py"), "--family=pastel", f"--output={folder / 'model'}"
    )
    images = draw_pictures(folder / "images", 4)
    text = DATASET.format(batch_size=2, images=images, dataset_keys="", subset_keys="", bucket_step=16, min_bucket=32)
    (folder / "data.toml").write_text(text, encoding="utf-8")
    (folder / "prompts.txt").write_text("a red cat --d 1\n", encoding="utf-8")
    return folder


def command(site: Path, folder: Path, *words: str) -> str:
    """Run Python with the package installed; what it wrote."""
    paths = os.pathsep.join((str(site), str(ROOT)))
    result = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def model_options(work: Path) -> list[str]:
    names = {"pretrained_model_name_or_path": "denoiser", "vae": "vae", "pastel_words": "words"}
    return [f"--{option}={work / 'model' / name}.safetensors" for option, name in names.items()]


def options(work: Path, out: str, *more: str) -> list[str]:
    return [
        *model_options(work), "--network_module=networks.lora", f"--dataset_config={work / 'data.toml'}",
        f"--output_dir={work / out}",
        "--output_name=lora", "--network_dim=2", f"--max_train_steps={STEPS}", "--seed=5", "--learning_rate=1e-2",
        "--max_data_loader_n_workers=0", *more,
    ]  # fmt: skip


CACHED = ("--network_train_unet_only", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


@pytest.fixture(scope="module")
def trained(site, work) -> Path:
    """The folder of a run with caches, samples and states."""
    command(
        site, work, "-m", "pastel.train_lora",
        *options(work, "whole", *CACHED, "--save_every_n_steps=2", "--save_state", f"--sample_prompts={work / 'prompts.txt'}",
                 "--sample_every_n_steps=2"),
    )  # fmt: skip
    return work / "whole"


def source_files() -> dict[str, tuple[int, int]]:
    """Every file of the project's own code, with what changes when it is written."""
    folders = [ROOT / name for name in ("library", "networks", "tools", "finetune")]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_it_trains_with_caches_and_samples(trained, work):
    metadata, content = read_parts(trained / "lora.safetensors")
    assert (
        metadata["ss_base_model_version"] == "pastel"
        and metadata["modelspec.architecture"] == "pastel-1/lora"
        and any(content)
    )
    assert len(list(work.glob("images/*_pastel.npz"))) == len(list(work.glob("images/*_pastel_te.npz"))) == 4
    assert len(list((trained / "sample").glob("lora_00000?_00_*.png"))) == STEPS // 2


def test_it_resumes_as_if_never_stopped(trained, site, work):
    state = next(
        path
        for path in sorted(trained.iterdir())
        if path.is_dir() and path.name.endswith("-state") and "000002" in path.name
    )
    command(site, work, "-m", "pastel.train_lora", *options(work, "resumed", *CACHED, f"--resume={state}"))
    assert read_parts(work / "resumed" / "lora.safetensors")[1] == read_parts(trained / "lora.safetensors")[1]


def test_its_adapter_is_converted_and_back_without_naming_the_family(trained, site, work):
    files = [trained / "lora.safetensors", work / "comfy.safetensors", work / "back.safetensors"]
    for source, target, layout in zip(files, files[1:], ("comfy", "kohya")):
        command(site, work, str(ROOT / "tools" / "convert_lora.py"), str(source), str(target), "--to", layout)
    names = json.loads(files[1].read_bytes()[8 : 8 + int.from_bytes(files[1].read_bytes()[:8], "little")])
    assert (
        "diffusion_model.strokes.0.mix.lora_down.weight" in names
        or "diffusion_model.strokes.0.mix.lora_A.weight" in names
    )
    assert read_parts(files[2])[1] == read_parts(files[0])[1]


def test_tools_tell_what_its_files_are_and_fill_its_caches(site, work, tmp_path):
    shutil.copytree(work / "images", tmp_path / "images" / "1_cat", ignore=shutil.ignore_patterns("*.npz"))
    told = command(
        site, tmp_path, str(ROOT / "tools" / "cache_latents.py"), "--pastel", *model_options(work),
        f"--train_data_dir={tmp_path / 'images'}", "--resolution=64", "--cache_latents_to_disk",
    )  # fmt: skip
    assert "is complete" in told and len(list(tmp_path.glob("images/*/*_pastel.npz"))) == 4
    code = (
        "from library.checkpoints.kinds import describe_checkpoint, check_slot\n"
        f"print(describe_checkpoint({str(work / 'model' / 'denoiser.safetensors')!r}))\n"
        f"print(check_slot({str(work / 'model' / 'denoiser.safetensors')!r}, 'pretrained_model_name_or_path', "
        f"{{'flux'}}))\n"
    )
    told = command(site, tmp_path, "-c", code)
    assert "a Pastel denoiser (2 strokes)" in told and "pastel_train_network.py trains such a model" in told


def test_its_help_imports_no_torch(site, tmp_path):
    told = command(site, tmp_path, "-X", "importtime", "-m", "pastel.train_lora", "--help")
    imported = {
        line.rsplit("|", 1)[-1].strip().split(".")[0] for line in told.splitlines() if line.startswith("import time:")
    }
    assert "--pastel_words" in told and not imported & {"torch", "numpy", "transformers", "accelerate"}


def test_it_is_registered_by_a_call_too_and_trains_its_text_encoder(site, work, monkeypatch):
    """Nothing of the project is written meanwhile, and caches in memory and none at all give the same weights."""
    monkeypatch.syspath_prepend(str(site))
    from pastel.record import FAMILY

    plant(monkeypatch, FAMILY)
    before = source_files()
    for out, more in (("live", ()), ("memory", ("--cache_latents",))):
        cli.run("pastel", "network", options(work, out, "--console_log_level=WARNING", *more))
    metadata, content = read_parts(work / "live" / "lora.safetensors")
    assert content == read_parts(work / "memory" / "lora.safetensors")[1]
    header = (work / "live" / "lora.safetensors").read_bytes()
    assert b"lora_te_reader_read" in header and b"lora_unet_strokes_1_out" in header
    assert source_files() == before


def test_a_name_that_is_taken_is_refused_and_a_broken_package_leaves_the_others(monkeypatch, caplog):
    with pytest.raises(ValueError, match="called 'flux' already"):
        plant(monkeypatch, FamilyRecord(name="flux", title="another"))
    with pytest.raises(ConfigError, match="unknown model family 'fluxx'; did you mean 'flux'"):
        registry.record_of("fluxx")
    monkeypatch.setattr(registry, "installed_points", lambda group: {"broken": "no_such_package:FAMILY"})
    monkeypatch.setattr(registry, "_records", {})
    monkeypatch.setattr(registry, "_is_complete", False)
    assert "flux" in registry.records() and "'broken' of an installed package is left out" in caplog.text

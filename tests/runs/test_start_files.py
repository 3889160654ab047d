"""Adapter files that a run begins with, for every family: --network_weights, --dim_from_weights, --base_weights, also
under the names of other programs; and learning rates per text encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.safetensors_utils import save_file_atomic
from library.tiny_models.hunyuan_image_tiny import build_tiny_hunyuan_image
from library.tiny_models.lumina_tiny import build_tiny_lumina
from library.training import cli
from networks.files.lora_conversion import to_diffusers, to_dotted
from tests.families import CASES
from tests.runs.conftest import draw_pictures
from tests.runs.test_anima import losses_of
from tests.tiny import build_tiny_flux
from tests.tiny_anima import build_tiny_anima
from tests.tiny_sd import build_tiny_sd

DATASET = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '{images}'\ncaption_extension = '.txt'\n"
RANK, ALPHA = 2, 0.5
FRESH = "--network_dim=4"
SAME, OTHER = 2e-5, 1e-3
"""relative differences of losses"""
FAMILIES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "flux": ("flux", build_tiny_flux),
    "anima": ("anima", build_tiny_anima),
    "lumina": ("lumina", lambda folder: build_tiny_lumina(folder, whole=True)),
    "hunyuan_image": ("hunyuan_image", build_tiny_hunyuan_image),
    "sd1": ("sd", lambda folder: build_tiny_sd(folder, "sd1", num_res_blocks=2)),
    "sdxl": ("sdxl", lambda folder: build_tiny_sd(folder, "sdxl", num_res_blocks=2)),
}
"""name of the case -> (family, maker of its tiny models)"""


@dataclass
class Start:
    """A family's models, pictures, and a trained file."""

    family: str
    tiny: Any
    folder: Path
    brief: tuple[str, ...] = ()
    losses: dict[tuple[str, ...], float] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    """script -> pixels of its picture without any adapter"""

    @property
    def file(self) -> Path:
        return self.folder / "first" / "lora.safetensors"

    def train(self, out: str, *more: str) -> Path:
        """One step unless `more` says otherwise; the written file."""
        images, data = self.folder / "images", self.folder / "data.toml"
        if not images.exists():
            draw_pictures(images, 4)
            data.write_text(DATASET.format(images=images), encoding="utf-8")
        cli.run(self.family, "network", [
            *self.tiny.arguments(), *self.brief, f"--dataset_config={data}", f"--output_dir={self.folder / out}",
            "--output_name=lora",
            "--network_module=networks.lora", "--max_train_steps=1", "--seed=5", "--learning_rate=1e-2",
            "--max_data_loader_n_workers=0", "--console_log_level=WARNING", *more,
        ])  # fmt: skip
        return self.folder / out / "lora.safetensors"

    def first_loss(self, *more: str) -> float:
        """Of a run in which nothing is trained yet; noise and order are those of every other run."""
        if more not in self.losses:
            self.losses[more] = losses_of(self.train(f"loss {len(self.losses)}", *more))[0]
        return self.losses[more]


def start(name: str, folder: Path) -> Start:
    family, make = FAMILIES[name]
    return Start(family, make(folder / "model"), folder, CASES[name].brief)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory) -> Start:
    made = start(request.param, tmp_path_factory.mktemp(request.param))
    made.train(
        "first", f"--network_dim={RANK}", f"--network_alpha={ALPHA}", "--max_train_steps=4", "--learning_rate=0.2"
    )
    return made


def test_all_ways_to_begin_with_a_file_begin_at_the_same_loss(trained: Start) -> None:
    plain = trained.first_loss(FRESH)
    going_on = trained.first_loss(f"--network_weights={trained.file}", f"--network_dim={RANK}")
    taken_over = trained.train("dims", "--dim_from_weights", f"--network_weights={trained.file}")
    merged = trained.first_loss(FRESH, "--base_weights", str(trained.file))
    assert going_on != pytest.approx(plain, rel=OTHER)
    assert [losses_of(taken_over)[0], merged] == pytest.approx([going_on] * 2, rel=SAME)
    state = load_file(taken_over)
    assert {len(tensor) for key, tensor in state.items() if key.endswith("lora_down.weight")} == {RANK}
    assert {float(tensor) for key, tensor in state.items() if key.endswith("alpha")} == {ALPHA}
    assert set(state) == set(load_file(trained.file))


def test_multipliers_of_base_weights(trained: Start) -> None:
    file = str(trained.file)
    plain, once = trained.first_loss(FRESH), trained.first_loss(FRESH, "--base_weights", file)
    assert trained.first_loss(FRESH, "--base_weights", file, "--base_weights_multiplier", "0") == pytest.approx(
        plain, rel=SAME
    )
    parts = trained.first_loss(FRESH, "--base_weights", file, file, "--base_weights_multiplier", "0.25", "0.75")
    assert parts == pytest.approx(once, rel=SAME) and once != pytest.approx(plain, rel=OTHER)


def test_cached_captions_are_those_of_the_merged_encoders(trained: Start) -> None:
    """Also when the plain encoders have filled the cache before, and they are the plain ones' again afterwards."""
    if trained.family == "sd":  # has no such cache
        with pytest.raises(ConfigError, match="cache_text_encoder_outputs"):
            trained.train("refused", "--cache_text_encoder_outputs")
        return
    if not CASES[trained.family].text_parts:  # nothing changes its text encoders
        assert all(key.startswith("lora_unet_") for key in load_file(trained.file))
        return
    only, text = [FRESH, "--network_train_unet_only"], ["--base_weights", str(trained.folder / "text.safetensors")]
    save_file_atomic({key: t for key, t in load_file(trained.file).items() if key.startswith("lora_te")}, Path(text[1]))
    plain, merged = trained.first_loss(*only), trained.first_loss(*only, *text)
    assert merged != pytest.approx(plain, rel=OTHER)
    disk = "--cache_text_encoder_outputs_to_disk"
    assert trained.first_loss(*only, "--cache_text_encoder_outputs", *text) == pytest.approx(merged, rel=SAME)
    assert trained.first_loss(*only, disk) == pytest.approx(plain, rel=SAME)
    assert trained.first_loss(*only, disk, *text) == pytest.approx(merged, rel=SAME)
    assert losses_of(trained.train("again", *only, disk, *text))[0] == pytest.approx(merged, rel=SAME)
    assert losses_of(trained.train("plain again", *only, disk))[0] == pytest.approx(plain, rel=SAME)


@pytest.mark.parametrize("option", ["--base_weights", "--network_weights"])
@pytest.mark.parametrize("layout", ["diffusers", "dotted"])
def test_files_of_other_programs_are_taken(trained: Start, layout: str, option: str) -> None:
    """The denoiser's part: some layouts have no names for text encoders."""
    own, path = trained.folder / "own.safetensors", trained.folder / f"{layout}.safetensors"
    tensors = {key: tensor for key, tensor in load_file(trained.file).items() if key.startswith("lora_unet_")}
    save_file_atomic(tensors, own)
    save_file_atomic((to_diffusers if layout == "diffusers" else to_dotted)(trained.family, tensors), path)
    more = FRESH if option == "--base_weights" else "--dim_from_weights"
    ours, theirs = (trained.first_loss(option, str(file), more) for file in (own, path))
    assert ours == pytest.approx(theirs, rel=SAME) and ours != pytest.approx(trained.first_loss(FRESH), rel=OTHER)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Start:
    return start("sdxl", tmp_path_factory.mktemp("rates"))


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        (["--text_encoder_lr", "1e-3", "4e-3"], {"te1": 1e-3, "te2": 4e-3, "unet": 1e-2}),
        (["--text_encoder_lr", "2e-3", "--unet_lr=5e-3"], {"te1": 2e-3, "te2": 2e-3, "unet": 5e-3}),
        (["--text_encoder_lr", "0", "3e-3"], {"te1": 0, "te2": 3e-3, "unet": 1e-2}),
        (["--text_encoder_lr", "3e-3", "0", "--unet_lr=0"], {"te1": 3e-3, "te2": 0, "unet": 0}),
        ([], {"te1": 1e-2, "te2": 1e-2, "unet": 1e-2}),
    ],
)  # fmt: skip
def test_rates_of_the_two_encoders_of_sdxl(sdxl: Start, options: list[str], rates: dict[str, float]) -> None:
    """The first step of AdamW moves every weight by its rate."""
    state = load_file(sdxl.train("_".join(["rates", *options]), "--network_dim=2", *options))
    moved = {
        part: max(
            float(tensor.abs().max())
            for key, tensor in state.items()
            if key.startswith(f"lora_{part}_") and "lora_up" in key
        )
        for part in rates
    }
    assert moved == pytest.approx(rates, rel=1e-2)


def test_more_rates_than_encoders_are_left_out_and_warned_of_unless_equal(sdxl: Start, caplog) -> None:
    """Front ends write one rate for every encoder that a model of any family has."""
    two = load_file(sdxl.train("two", "--text_encoder_lr", "1e-3", "1e-3"))
    three = load_file(sdxl.train("three", "--text_encoder_lr", "1e-3", "1e-3", "1e-3"))
    assert two.keys() == three.keys() and all(torch.equal(two[key], three[key]) for key in two)
    assert "sdxl has 2 text encoders" not in caplog.text
    sdxl.train("other", "--text_encoder_lr", "1e-3", "1e-3", "1e-4")
    assert "--text_encoder_lr 0.0001: has no effect: sdxl has 2 text encoders" in caplog.text

"""--show_timesteps: the text and the picture, for families of pictures and of clips, without any model or data."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from library.core.errors import ConfigError
from library.training import cli
from tests.planted import plant
from tests.toy_video.cached import RECORD

QUIET = "--console_log_level=WARNING"


def shown(capsys, family: str, *argv: str) -> list[str]:
    cli.run(family, "network", ["--show_timesteps=console", QUIET, *argv])
    return capsys.readouterr().out.splitlines()


def shares(lines: list[str]) -> dict[int, float]:
    """Start of each part -> percent, of the first table."""
    rows = (re.fullmatch(r" *(\d+)\.\. *\d+ +([\d.]+)% \|(#*)", line) for line in lines)
    return {int(row[1]): float(row[2]) for row in rows if row}


def test_the_text_shows_the_law_and_the_weights(capsys, monkeypatch):
    """Shares by hand: uniform gives 2.5 percent to each of 40 parts; a range leaves the others empty."""
    plant(monkeypatch, RECORD)
    uniform = shares(shown(capsys, RECORD.name, "--timestep_sampling=uniform"))
    assert list(uniform) == list(range(0, 1000, 25)) and all(2.3 < share < 2.7 for share in uniform.values())
    upper = shares(shown(capsys, RECORD.name, "--timestep_sampling=uniform", "--min_timestep=875"))
    assert all((share > 0) == (start >= 875) for start, share in upper.items()) and 19 < upper[900] < 21
    lines = shown(capsys, RECORD.name, "--weighting_scheme=sigma_sqrt")
    weights = lines[lines.index("weight of the loss:") + 1 :]
    assert len(weights) == 40 and float(weights[-1].split("..")[1].split()[1]) == pytest.approx(1.025, abs=0.01)
    assert max(line.count("#") for line in lines) == 64


@pytest.mark.parametrize("family", ["flux", "sd3", "anima", "hunyuan_image", "lumina"])
def test_families_of_pictures_show_theirs(capsys, family):
    assert sum(shares(shown(capsys, family)).values()) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("family", ["flux", "sd3", "anima", "hunyuan_image", "lumina", "hunyuan_video", "chroma"])
def test_every_family_has_every_law(capsys, family):
    """Those that only other trainers know; of SD3 the shift is that of --training_shift."""
    shift = "--training_shift=1" if family == "sd3" else "--discrete_flow_shift=1"
    plain = shares(shown(capsys, family, "--timestep_sampling=logit_normal", shift))
    assert sum(plain.values()) == pytest.approx(100, abs=0.5) and plain[0] < 0.2 and plain[500] == pytest.approx(4, abs=0.2)
    assert sum(shares(shown(capsys, family, "--timestep_sampling=krea2_shift")).values()) == pytest.approx(100, abs=0.5)


def test_the_resolution_counts_where_the_law_hangs_on_it(capsys):
    small, large = (
        shares(shown(capsys, "flux", "--timestep_sampling=flux_shift", f"--show_timesteps_resolution={size}"))
        for size in ("256", "2048,1024")
    )
    assert sum(small[start] for start in range(750, 1000, 25)) < 30 < sum(large[start] for start in range(750, 1000, 25))


def test_the_picture_is_a_png_in_the_output_folder(tmp_path, caplog):
    out = tmp_path / "out"
    words = ["--show_timesteps=image", f"--output_dir={out}", "--output_name=my", "--weighting_scheme=cosmap", QUIET]
    cli.run("sd3", "network", words)
    with Image.open(out / "my-timesteps.png") as picture:
        assert picture.format == "PNG" and picture.width > 600
    assert [path.name for path in out.iterdir()] == ["my-timesteps.png"]


def test_what_is_wrong_is_told(capsys):
    with pytest.raises(ConfigError, match="flux2_shift"):
        shown(capsys, "anima", "--timestep_sampling=flux2_shft")
    with pytest.raises(ConfigError, match="SD3 draws whole timesteps"):
        shown(capsys, "sd3", "--timestep_sampling=uniform")
    with pytest.raises(ConfigError, match="whole timesteps"):
        shown(capsys, "sd", "--timestep_sampling=sigmoid")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_families_with_a_table_of_levels_show_theirs(capsys, family):
    """Whole timesteps from 400 on, all equally often; the weight of the cleanest part from the schedule of Stable
    Diffusion, and of the noisiest, whose ratios are below 5."""
    lines = shown(capsys, family, "--min_timestep=400", "--min_snr_gamma=5")
    assert "equally likely" in lines[0] and "sigma" not in lines[0]
    percents = shares(lines)
    assert all((share > 0) == (start >= 400) for start, share in percents.items()) and 3.9 < percents[500] < 4.4
    weights = lines[lines.index("weight of the loss:") + 1 :]
    numbers = [float(line.split("|")[0].split()[-1]) for line in weights]
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[:25]
    assert numbers[0] == pytest.approx(np.mean(5 * (1 - kept) / kept), rel=1e-3) and numbers[-1] == 1


@pytest.mark.parametrize("wrong", ["--show_timesteps_resolution=0,0", "--min_timestep=-1", "--loss_weighting_gamma=0"])
def test_a_wrong_option_is_told_without_models_and_data_that_are_not_needed(wrong):
    with pytest.raises(ConfigError) as told:
        cli.run("flux", "network", ["--show_timesteps=console", QUIET, wrong])
    assert wrong.split("=")[0].lstrip("-") in str(told.value) and "is not given" not in str(told.value)
    assert "no images" not in str(told.value) and "network_module" not in str(told.value)

"""The sampler of samples while a flow model trains: chosen for all, for one prompt, or the family's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.families import CASES, marks_of
from tests.runs.conftest import sample_pictures
from tests.runs.families import Tinies

FLOW_CASES = [name for name, case in CASES.items() if case.family not in ("sd", "sdxl")]
LINES = ("", " --ss er_sde", " --ss ddim", " --ss pndm", " --ss euler")


def samples(work, name: str, *options: str) -> list[Image.Image]:
    """Those of LINES, in order."""
    line = f"a red cat --w 64 --h 64 --s 3 --d 1{work.case.letters(work.images)}"
    prompts = work.folder / "prompts.txt"
    prompts.write_text("".join(f"{line}{more}\n" for more in LINES), encoding="utf-8")
    given = ("--max_train_steps=1", "--network_train_unet_only", f"--sample_prompts={prompts}", "--sample_at_first")
    work.train(name, *given, *options)
    return [Image.open(path) for path in sample_pictures(work.folder / name)]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in FLOW_CASES])
def test_every_flow_family_follows_the_sampler(name: str, tinies: Tinies, tmp_path: Path, caplog) -> None:
    work = tinies.work(name, tmp_path)
    own, er_sde, ddim, pndm, euler = samples(work, "own")
    assert [picture.tobytes() for picture in (ddim, pndm)] == [own.tobytes()] * 2 and er_sde.tobytes() != own.tobytes()
    assert (euler.tobytes() == own.tobytes()) == (work.family not in ("wan", "framepack"))  # whose own is UniPC
    assert "--ss pndm of sample prompts is ignored: a sampler of SD models" in caplog.text
    assert er_sde.text["sampler"] == "er_sde" and own.text.get("sampler") == ("ddim" if name == "anima" else None)
    chosen = samples(work, "chosen", "--sample_sampler=er_sde")
    assert [picture.tobytes() for picture in chosen] == [
        picture.tobytes() for picture in (er_sde, er_sde, own, er_sde, euler)
    ]


@pytest.mark.parametrize("family", sorted({CASES[name].family for name in FLOW_CASES}))
def test_samplers_of_sd_models_are_listed_and_change_nothing(family: str) -> None:
    from library.training.inference_samplers import DEFAULT_SAMPLER, SamplerOptions
    from library.training.parser_common import parse_command

    def read(name: str):
        found = parse_command([f"--sample_sampler={name}", "--network_module=networks.lora"], family, "network").config
        return found[SamplerOptions].sample_sampler, [line.written for line in found.ignored]

    for name in ("euler_a", "ddpm", "dpmsingle", "K_DPM_2"):
        assert read(name) == (DEFAULT_SAMPLER, [f"--sample_sampler {name}"])
    assert read(DEFAULT_SAMPLER) == (DEFAULT_SAMPLER, []) and read("heun") == ("heun", [])

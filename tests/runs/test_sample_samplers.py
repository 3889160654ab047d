"""The sampler of samples while a flow model trains: chosen for all, for one prompt, or the family's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.core.errors import ConfigError
from tests.families import CASES, marks_of
from tests.runs.conftest import sample_pictures
from tests.runs.families import Tinies

FLOW_CASES = [name for name, case in CASES.items() if case.family not in ("sd", "sdxl")]
LINES = ("", " --ss er_sde", " --ss ddim", " --ss pndm", " --ss euler", " --sg karras")


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
    own, er_sde, ddim, pndm, euler, karras = samples(work, "own")
    assert karras.tobytes() != own.tobytes()
    assert [picture.tobytes() for picture in (ddim, pndm)] == [own.tobytes()] * 2 and er_sde.tobytes() != own.tobytes()
    assert (euler.tobytes() == own.tobytes()) == (work.family not in ("wan", "framepack"))  # whose own is UniPC
    assert "--ss pndm of sample prompts is ignored: a sampler of SD models" in caplog.text
    assert er_sde.text["sampler"] == "er_sde" and own.text.get("sampler") == ("ddim" if name == "anima" else None)
    chosen = samples(work, "chosen", "--sample_sampler=er_sde")
    assert [picture.tobytes() for picture in chosen[:-1]] == [
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


@pytest.mark.parametrize("name", ["flux", "sd1"])
def test_a_table_is_for_all_prompts_but_those_that_say_otherwise(name: str, tinies: Tinies, tmp_path: Path) -> None:
    work, pictures = tinies.work(name, tmp_path), {}
    prompts, line = tmp_path / "prompts.txt", "a red cat --w 64 --h 64 --s 4 --d 1 --ss heun"
    prompts.write_text(f"{line}\n{line} --sg beta\n{line} --sg -\n", encoding="utf-8")
    given = ("--max_train_steps=1", "--network_train_unet_only", f"--sample_prompts={prompts}", "--sample_at_first")
    for table in (None, "beta"):
        work.train(str(table), *given, *([f"--sample_sigma_table={table}"] if table else []))
        pictures[table] = [Image.open(path).tobytes() for path in sample_pictures(tmp_path / str(table))]
    own, beta, none = pictures[None]
    assert own == none != beta and pictures["beta"] == [beta, beta, own]
    if name == "sd1":
        with pytest.raises(ConfigError, match="--sample_sigma_table is beta with the sampler pndm"):
            work.train("no", *given, "--sample_sigma_table=beta", "--sample_sampler=pndm")
    with pytest.raises(ConfigError, match="--sample_sigma_table.*did you mean 'karras'"):
        work.train("no", *given, "--sample_sigma_table=karas")

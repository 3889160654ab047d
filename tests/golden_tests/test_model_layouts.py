"""Names of the tensors in model files that are written, at real size, without data: counts and hashes of the reference
file diffusers_layouts.json."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import pytest
import torch

from library import anima_utils, chroma_utils, flux_utils, lumina_utils, sd3_utils
from library.checkpoints.loading import build_on_meta, strip_prefix
from tests.golden_dir import behaviour
from tests.runs.families import key_table

FILE = "diffusers_layouts.json"
ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g_hf", "t5xxl": "t5xxl"}


def metas(table: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in key_table(table).items()}


def loaded(inspect: Callable, model: Callable, table: str) -> torch.nn.Module:
    """A denoiser without data, of the sizes of a real file. `inspect` reads the sizes."""
    params = inspect(metas(table)).params
    return build_on_meta(lambda: model(params))


def written_keys(utils, monkeypatch: pytest.MonkeyPatch, save: Callable[[], None]) -> list[str]:
    """The names that a save hands to the file."""
    states: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(utils, "save_file_atomic", lambda state, path, metadata=None: states.append(dict(state)))
    save()
    (state,) = states
    return list(state)


def of_whole_file(part: str, path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """What stands for reading a part: the names of one in a real file of all."""
    return strip_prefix(metas(path), sd3_utils.FILE_PREFIXES[part]), {}


def flux() -> Callable[[], None]:
    model = loaded(flux_utils.inspect_flow_model, flux_utils.Flux, "flux_dev")
    return lambda: flux_utils.save_flow_model(model, "x")


def chroma() -> Callable[[], None]:
    model = loaded(chroma_utils.inspect_chroma, chroma_utils.Chroma, "chroma")
    return lambda: chroma_utils.save_chroma(model, "x")


def lumina() -> Callable[[], None]:
    model = loaded(lumina_utils.inspect_lumina, lumina_utils.NextDiT, "lumina2")
    return lambda: lumina_utils.save_lumina(model, "x")


def sd3(*encoders: str) -> Callable[[], None]:
    model = loaded(sd3_utils.inspect_sd3, sd3_utils.MMDiT, "sd3_medium")
    parts = dict.fromkeys(("vae", *encoders), "sd3_medium_checkpoint")
    return lambda: sd3_utils.save_whole_sd3(model, "x", parts)


CASES = {
    "flux_single_file": (flux_utils, flux), "chroma_single_file": (flux_utils, chroma),
    "lumina2_single_file": (lumina_utils, lumina), "sd3_single_file": (sd3_utils, sd3),
    "sd3_single_file_with_encoders": (sd3_utils, lambda: sd3(*ENCODERS)),
}  # fmt: skip
SIDE_FILES = {f"sd3_{slot}_side_file": table for slot, table in ENCODERS.items()}


def check(recorded: dict, names: Iterable[str]) -> None:
    names = sorted(names)
    assert len(names) == recorded["count"]
    assert hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest() == recorded["hash"]


@pytest.mark.parametrize("name", CASES)
def test_names_of_a_file_that_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    utils, make = CASES[name]
    monkeypatch.setattr(sd3_utils, "_part_of_file", of_whole_file)
    check(behaviour(FILE)["layouts"][name], written_keys(utils, monkeypatch, make()))


@pytest.mark.parametrize("name", SIDE_FILES)
def test_text_encoders_beside_a_model_are_read(name: str) -> None:
    """Files that known trainers write have the names of the real ones, which our readers know."""
    slot = name.removeprefix("sd3_").removesuffix("_side_file")
    table = metas(SIDE_FILES[name])
    check(behaviour(FILE)["layouts"][name], table)
    assert sd3_utils.inspect_encoder(slot, table)


def test_the_names_that_anima_files_have() -> None:
    model = loaded(anima_utils.inspect_anima, anima_utils.Anima, "anima")
    names = [anima_utils.FILE_PREFIX + key for key in model.state_dict()]
    check(behaviour(FILE)["layouts"]["anima_single_file"], names)

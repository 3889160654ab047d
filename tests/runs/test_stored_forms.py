"""Model files as other programs pass them around: in several parts, all models in one, and in scaled 8-bit numbers. A
run from them is the run from one plain file for each model with the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from library.checkpoints.kinds import describe_checkpoint
from tests.families import CASES
from tests.runs.conftest import losses_of
from tests.runs.families import MODEL, FamilyWork, Tinies

LARGEST = 448.0
"""of float8_e4m3fn"""
PLACES = {
    MODEL: ("model.diffusion_model.", ""), "ae": ("vae.", "vae"), "vae": ("vae.", "vae"),
    "clip_l": ("text_encoders.clip_l.transformer.", "clip_l"),
    "clip_g": ("text_encoders.clip_g.transformer.", "clip_g"),
    "t5xxl": ("text_encoders.t5xxl.transformer.", "t5xxl"), "t5": ("text_encoders.umt5xxl.transformer.", "umt5"),
    "byt5": ("text_encoders.byt5_small.transformer.", "t5xxl"),
    "text_encoder1": ("text_encoders.llama.transformer.", "llama"),
    "text_encoder2": ("text_encoders.clip_l.transformer.", "clip_l"),
    "gemma2": ("text_encoders.gemma2_2b.transformer.", "gemma2"),
    "text_encoder": ("text_encoders.qwen25_7b.transformer.", "qwen25_vl"),
    "qwen3": ("text_encoders.qwen3_06b.transformer.", "qwen3"),
}
"""option -> (what stands before the names of the model in a file of all, its entry in what shapes do not tell); others
have a file of their own beside it"""


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def is_scaled(key: str, tensor: torch.Tensor) -> bool:
    """Whether programs that make such files scale this tensor: matrices of layers, not embeddings."""
    return key.endswith(".weight") and tensor.ndim == 2 and not any(word in key for word in ("embed", "shared"))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def scaled(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(what such a file holds, with both names of scales; the weights that it stands for)."""
    stored, plain, number = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}, 0
    for key, tensor in state.items():
        stored[key] = plain[key] = tensor
        if not is_scaled(key, tensor):
            continue
        scale = tensor.float().abs().max() / LARGEST
        stored[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        plain[key] = stored[key].float() * scale
        layer, number = key.removesuffix(".weight"), number + 1
        if number % 2:
            stored |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": torch.ones(1)}
        else:
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}
    assert number
    return stored, plain


def write_parts(state: dict[str, torch.Tensor], metadata: dict[str, str], folder: Path) -> dict[str, Path]:
    """A model in two files: the index, a part and the folder, each of which names all of it."""
    folder.mkdir()
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    places = {key: names[number % 2] for number, key in enumerate(sorted(state))}
    for name in names:
        save_file({key: state[key] for key, place in places.items() if place == name}, folder / name, metadata)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return {"index": index, "part": folder / names[1], "folder": folder}


class Bundle:
    """A file of all models of a set, as ComfyUI writes them."""

    def __init__(self, path: Path) -> None:
        self.path, self.state, self.config = path, {}, {}
        self.options: list[str] = []

    def add(self, option: str, stored: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        prefix, entry = PLACES[option.removeprefix("--")]
        config = json.loads(metadata.get("model_config", "{}"))
        self.config |= {entry: config} if entry else config
        for key, tensor in stored.items():
            is_placed = key.startswith(("model.diffusion_model.", "first_stage_model."))
            self.state[key if is_placed else prefix + key.removeprefix("net.")] = tensor
        if prefix.startswith("text_encoders."):
            self.state[prefix.removesuffix("transformer.") + "logit_scale"] = torch.tensor(4.6)
        self.options.append(f"{option}={self.path}")

    def written(self) -> Bundle:
        save_file(self.state, self.path, {"model_config": json.dumps(self.config)})
        return self


def model_files(work: FamilyWork) -> Iterator[tuple[str, Path]]:
    """(option, file) of the models of a set."""
    for word in work.tiny.arguments():
        option, _, path = word.partition("=")
        if path.endswith(".safetensors"):
            yield option, Path(path)


@pytest.mark.parametrize("name", CASES)
def test_scaled_numbers_in_files_of_other_forms_train_as_the_weights_that_they_stand_for(
    name: str, tinies: Tinies, tmp_path: Path
) -> None:
    work, plain, given = tinies.work(name, tmp_path), [], []
    bundle = Bundle(tmp_path / "all.safetensors")
    for number, (option, path) in enumerate(model_files(work)):
        state, metadata = read(path)
        kind = describe_checkpoint(path)
        if any(is_scaled(*item) for item in state.items()):
            stored, state = scaled(state)
        else:
            stored = state
        ways = write_parts(stored, metadata, tmp_path / f"parts{number}")
        found = {way: describe_checkpoint(place) for way, place in ways.items()}
        assert {kind.kind} == {description.kind for description in found.values()}, found
        assert all(description.detail.startswith(kind.detail.partition(",")[0]) for description in found.values())
        save_file(state, tmp_path / f"plain{number}.safetensors", metadata)
        plain.append(f"{option}={tmp_path / f'plain{number}.safetensors'}")
        given.append(f"{option}={ways['index' if number % 2 else 'part']}")
        if option.removeprefix("--") in PLACES:
            bundle.add(option, stored, metadata)
        else:
            bundle.options.append(given[-1])
    options = ["--network_train_unet_only", "--max_train_steps=2"]
    forms = {"plain": plain, "parts": given}
    if len(plain) > 1:  # otherwise the model is one file of all anyway
        forms["bundle"] = bundle.written().options
    losses = {form: losses_of(work.train(form, *options, *files)) for form, files in forms.items()}
    for form in forms.keys() - {"plain"}:  # weights at another place in memory may add up differently
        assert losses[form] == pytest.approx(losses["plain"], rel=1e-5), form

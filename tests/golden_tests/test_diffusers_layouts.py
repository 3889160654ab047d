"""Names in the files of whole models, at the sizes of real ones: single files and folders in the layout of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from library import anima_utils, chroma_utils, flux_utils, lumina_utils, sd3_utils
from library.components.ldm_folder_files import SLOTS, read_single
from library.core.registry import import_target
from library.families.registry import record_of
from library.training import parser_common
from tests.golden_dir import BEHAVIOUR_DIR, MissingFile, behaviour
from tests.golden_tests.real_sizes import RealModels, digest

FILE = "diffusers_layouts.json"
UNETS = {
    "sd1": ("sd15_checkpoint", "sd", ()), "sd2": ("sd21_checkpoint", "sd", ("--v2",)),
    "sdxl": ("sdxl_checkpoint", "sdxl", ()),
}  # fmt: skip
"""kind -> (key table, family, its options)"""
DENOISERS = {
    "flux": ("flux_dev", flux_utils, "save_flow_model"), "chroma": ("chroma", chroma_utils, "save_chroma"),
    "lumina2": ("lumina2", lumina_utils, "save_lumina"), "anima": ("anima", anima_utils, "save_anima"),
}  # fmt: skip
"""kind -> (key table, module and function that write it)"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModels:
    return RealModels(tmp_path_factory.mktemp("real"))


def layout(name: str) -> Any:
    if not (BEHAVIOUR_DIR / FILE).exists():
        return MissingFile(BEHAVIOUR_DIR / FILE)
    return behaviour(FILE)["layouts"][name]


def agrees(keys: Any, entry: dict[str, Any]) -> bool:
    return digest(keys) == (entry["count"], entry["hash"])


@pytest.mark.parametrize("kind", DENOISERS)
def test_files_of_a_denoiser(kind: str, real: RealModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, module, function = DENOISERS[kind]
    written: dict[str, torch.Tensor] = {}
    for place in {module, flux_utils}:
        monkeypatch.setattr(place, "save_file_atomic", lambda state, *_: written.update(state), raising=False)
    getattr(module, function)(real[table], tmp_path / "model.safetensors")
    assert agrees(written, layout(f"{kind}_single_file"))


def test_a_file_of_sd3_and_its_text_encoders(real: RealModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser with the autoencoder; text encoders beside it, or in it."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    whole, base = real.file("sd3_medium_checkpoint"), real["sd3_medium"]
    written: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(sd3_utils, "save_file_atomic", lambda state, *_: written.update(state))
    sd3_utils.save_whole_sd3(base, "model.safetensors", {"vae": str(whole)})
    assert agrees(written, layout("sd3_single_file"))
    with torch.device("meta"):
        encoders = {
            "clip_l": CLIPTextModelWithProjection(CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12,
            )),
            "clip_g": CLIPTextModelWithProjection(CLIPTextConfig(
                vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                num_attention_heads=20, projection_dim=1280,
            )),
            "t5xxl": T5EncoderModel(T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )),
        }  # fmt: skip
    for slot, encoder in encoders.items():
        written.clear()
        sd3_utils.save_encoder(encoder, slot, whole, "encoder.safetensors")
        found = {key for key in written if key != "spiece_model"}  # T5's tokenizer travels in its file here
        if slot == "clip_l" and len(found) == layout("sd3_clip_l_side_file")["count"] + 1:
            found -= {"text_projection.weight"}  # which the file of the known trainer does not have
        assert agrees(found, layout(f"sd3_{slot}_side_file")), slot


@pytest.mark.parametrize("kind", UNETS)
def test_files_and_folders_of_models_with_a_unet(kind: str, real: RealModels) -> None:
    table, family, words = UNETS[kind]
    file = real.file(table)
    folder = read_single(str(file), kind, "epsilon")
    entry = layout(f"{kind}_diffusers")
    parts = {"unet/diffusion_pytorch_model": folder.unet, "vae/diffusion_pytorch_model": folder.parts["vae"]}
    parts |= {f"{slot.subfolder}/model": folder.parts[slot.subfolder] for slot, _ in SLOTS[kind]}
    assert {name for name in parts if not agrees(parts[name], entry["files"][name])} == set()
    assert set(parts) == set(entry["files"])
    tokenizers = {f"{slot.subfolder.replace('text_encoder', 'tokenizer')}/" for slot, _ in SLOTS[kind]}
    assert {*folder.configs, *tokenizers} == set(entry["other_files"])
    config = parser_common.parse([f"--pretrained_model_name_or_path={file}", *words], family, "full")
    wiring = import_target(record_of(family).family)(config)
    state = wiring.file_tensors(wiring.base_denoiser(), wiring.base_text_encoders(), wiring._base_vae())
    single = layout(f"{kind}_single_file")
    assert agrees(state, single) or agrees(state, single["with_position_ids"])

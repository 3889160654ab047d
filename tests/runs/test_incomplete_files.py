"""Model files from which one tensor is missing that tells nothing of the model's sizes: whoever reads them names file and
tensor, in every slot of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from library.core.errors import AtelierError
from library.safetensors_utils import read_header
from library.training.accelerator_setup import prepare_runtime
from tests.families import CASES
from tests.runs.families import Tinies
from tests.runs.test_stored_forms import model_files

MISSING = (
    "output_blocks.1.0.in_layers.0.bias", "single_blocks.1.norm.key_norm.scale", "layers.1.input_layernorm.weight",
    "joint_blocks.1.x_block.mlp.fc2.bias", "layers.1.attention_norm1.weight", "blocks.1.mlp.layer2.weight",
    "single_blocks.1.linear2.bias", "layers.1.layer_norm2.bias", "block.1.layer.1.layer_norm.weight",
    "layers.1.mlp.down_proj.weight", "decoder.conv_out.bias", "decoder.conv_out.conv.bias", "decoder.head.2.bias",
    "blocks.1.norm3.bias", "transformer.1.norm2.bias", "blocks.1.proj_mlp.bias",
)  # fmt: skip
"""endings of names, the first that a file has"""


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.mark.parametrize("name", CASES)
def test_a_missing_tensor_is_named(name: str, tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work(name, tmp_path)
    for number, (option, path) in enumerate(model_files(work)):
        state, given = load_file(path), tmp_path / f"part{number}.safetensors"
        missing = next(key for ending in MISSING for key in sorted(state) if key.endswith(ending))
        save_file({k: t for k, t in state.items() if k != missing}, given, read_header(path)[1])
        family = work.trainer("out", f"{option}={given}").family
        with pytest.raises(AtelierError) as caught:
            runtime = prepare_runtime(family.config)
            for load in (family.load_vae, family.load_text_encoders, family.load_denoiser):
                load(runtime)
            family.load_parts(runtime, "vae")
        told = str(caught.value)
        assert str(given) in told and missing.rpartition(".")[2] in told and "missing" in told, (option, missing, told)
        assert missing.split(".")[-2] in told, (missing, told)

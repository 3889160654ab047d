"""Qwen3 as a text encoder: sizes from shapes, every prefix, and the model of transformers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from library.components import llm_encoder_utils
from library.core.errors import CheckpointError
from library.safetensors_utils import save_file_atomic
from tests.library.test_flux_utils import empty_checkpoint

KEY_TABLE = Path(__file__).parents[1] / "golden" / "checkpoints" / "qwen3_0_6b.json.gz"


def reference_model() -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6,
    )  # fmt: skip
    return Qwen3Model(config).eval().requires_grad_(False)


def test_sizes_of_the_real_file(tmp_path: Path) -> None:
    with gzip.open(KEY_TABLE, "rt") as file:
        path = empty_checkpoint(tmp_path / "q.safetensors", json.load(file))
    values = llm_encoder_utils.inspect_qwen3(path)
    assert values == {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6, "eps": 1e-6,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", [*llm_encoder_utils.QWEN3_PREFIXES, "", "folder"])
def test_every_layout_gives_the_output_of_transformers(tmp_path: Path, prefix: str) -> None:
    reference = reference_model()
    if prefix == "folder":
        reference.save_pretrained(tmp_path / "text_encoder")
        path = tmp_path
    else:
        path = tmp_path / "q.safetensors"
        state = {prefix + key: tensor for key, tensor in reference.state_dict().items()}
        save_file_atomic({**state, "lm_head.weight": torch.zeros(40, 16)}, path)
    model = llm_encoder_utils.load_qwen3(path, torch.float32, "cpu")
    ids, mask = torch.tensor([[3, 4, 5, 0]]), torch.tensor([[1, 1, 1, 0]])
    expected = reference(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, expected)


def test_another_language_model_is_an_error(tmp_path: Path) -> None:
    save_file_atomic({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError, match="holds no Qwen3 text encoder"):
        llm_encoder_utils.load_qwen3(tmp_path / "q.safetensors", None, "cpu")

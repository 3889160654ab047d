"""Qwen3 and the text tower of Qwen2.5-VL as text encoders: sizes from shapes, every prefix, and the model of
transformers."""

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


@pytest.mark.parametrize(
    "prefix", ["", "model.", "model.language_model.", "text_encoders.qwen25_7b.transformer.model.", "folder"]
)
def test_the_text_tower_of_a_model_that_sees_pictures(tmp_path: Path, prefix: str) -> None:
    """Its layers give what transformers' model gives for a text; a folder of transformers 5 has them under
    language_model."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(3)
    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    reference = (
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
        .eval()
        .requires_grad_(False)
    )
    tower, path = reference.model.language_model, tmp_path / "q.safetensors"
    if prefix == "folder":
        reference.save_pretrained(tmp_path / "text_encoder")
        path = tmp_path
    else:
        state = {f"{prefix}{key}": tensor for key, tensor in tower.state_dict().items()}
        save_file_atomic(
            {**state, "visual.patch_embed.proj.weight": torch.zeros(1), "lm_head.weight": torch.zeros(40, 16)}, path
        )
    model = llm_encoder_utils.load_qwen25_vl(path, torch.float32, "cpu", config={"num_attention_heads": 2})
    ids = torch.tensor([[3, 4, 5, 9]])
    expected = reference(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    found = model(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected))


@pytest.mark.parametrize(
    ("load", "name"), [(llm_encoder_utils.load_qwen3, "qwen25"), (llm_encoder_utils.load_qwen25_vl, "qwen3")]
)
def test_the_two_kinds_are_told_apart(tmp_path: Path, load, name: str) -> None:
    attention = "model.layers.0.self_attn."
    marks = {
        "qwen25": {f"{attention}q_proj.bias": torch.zeros(2)},
        "qwen3": {f"{attention}q_norm.weight": torch.zeros(2)},
    }
    save_file_atomic({"model.embed_tokens.weight": torch.zeros(2, 2), **marks[name]}, tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError, match="text encoder"):
        load(tmp_path / "q.safetensors", None, "cpu")

"""CLIP-L and T5 loaders: the same outputs as transformers' own loading, from folders and files of every kind."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.components.text_encoder_utils import (
    CLIP_PREFIXES,
    T5_PREFIXES,
    attended,
    inspect_clip_l,
    load_clip_l,
    load_t5xxl,
    ready_mask,
)
from library.core.errors import CheckpointError
from library.flux_utils import get_t5xxl_actual_dtype
from library.safetensors_utils import save_file_atomic
from tests.tiny import build_tiny_flux, clip_state, t5_state

IDS = torch.tensor([[5, 17, 3, 39, 1, 1], [5, 39, 39, 39, 1, 1]])


def clip_reference() -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=48, intermediate_size=80, projection_dim=24, num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=20, hidden_act="gelu", eos_token_id=39, bos_token_id=38, pad_token_id=39,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def t5_reference() -> T5EncoderModel:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2, relative_attention_num_buckets=16,
        relative_attention_max_distance=20, feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-5,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


@torch.no_grad()
def test_clip_from_a_folder(tmp_path) -> None:
    reference = clip_reference()
    reference.save_pretrained(tmp_path / "text_encoder")
    model = load_clip_l(tmp_path, torch.float32, "cpu")
    expected, result = reference(IDS), model(IDS)
    torch.testing.assert_close(result.text_embeds, expected.text_embeds)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state)
    assert "text_model.encoder.layers.0.self_attn.q_proj" in dict(model.named_modules())  # adapter keys come from here


@torch.no_grad()
def test_t5_from_a_folder(tmp_path) -> None:
    reference = t5_reference()
    reference.save_pretrained(tmp_path / "text_encoder_2", max_shard_size="10KB")
    model = load_t5xxl(tmp_path, torch.float32, "cpu")
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for given in (None, mask):
        torch.testing.assert_close(model(IDS, given).last_hidden_state, reference(IDS, given).last_hidden_state)
    assert model.encoder.embed_tokens.weight is model.shared.weight


def random_clip(**sizes) -> dict[str, torch.Tensor]:
    return clip_state(
        torch.Generator().manual_seed(0), **{"width": 64, "layers": 2, "vocab": 40, "max_len": 20, **sizes}
    )


def random_t5() -> dict[str, torch.Tensor]:
    return t5_state(torch.Generator().manual_seed(0), d_model=24, d_kv=8, heads=2, d_ff=40, layers=2, vocab=50)


@pytest.mark.parametrize("prefix", ["", *CLIP_PREFIXES])
def test_clip_prefixes_and_entries_that_are_no_weights(tmp_path, prefix: str) -> None:
    state = {prefix + key: tensor for key, tensor in random_clip().items()}
    state |= {prefix + "text_model.embeddings.position_ids": torch.arange(20)[None], "logit_scale": torch.ones(())}
    save_file_atomic(state, tmp_path / "c.safetensors")
    model = load_clip_l(tmp_path / "c.safetensors", None, "cpu")
    assert model.config.num_attention_heads == 1 and model.config.eos_token_id == 39
    with torch.no_grad():
        result = model(IDS)
        assert torch.equal(
            result.text_embeds, result.last_hidden_state[[0, 1], [3, 1]]
        )  # identity projection, first EOS
    assert torch.equal(model.text_model.embeddings.position_ids, torch.arange(20)[None])


@pytest.mark.parametrize("prefix", ["", *T5_PREFIXES])
@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_t5_prefixes_embeddings_and_blobs(tmp_path, prefix: str, embedding: str) -> None:
    state = random_t5()
    table = state.pop("shared.weight")
    state |= {key: table for key in ("shared.weight", "encoder.embed_tokens.weight") if embedding in (key, "both")}
    state = {prefix + key: tensor for key, tensor in state.items()}
    state |= {prefix + "spiece_model": torch.zeros(9, dtype=torch.uint8), prefix + "scaled_fp8": torch.zeros(0)}
    save_file_atomic(state, tmp_path / "t.safetensors")
    model = load_t5xxl(tmp_path / "t.safetensors", torch.float32, "cpu")
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert torch.isfinite(model(IDS).last_hidden_state).all()


def test_8_bit_files_are_widened(tmp_path) -> None:
    for name, state, load in (("c", random_clip(), load_clip_l), ("t", random_t5(), load_t5xxl)):
        narrow = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in state.items()}
        path = tmp_path / f"{name}.safetensors"
        save_file_atomic(narrow, path)
        for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
            model = load(path, dtype, "cpu")
            assert {parameter.dtype for parameter in model.parameters()} == {expected}
            assert all(torch.equal(model.state_dict()[key], tensor.to(expected)) for key, tensor in narrow.items())
    assert get_t5xxl_actual_dtype(model) == torch.float32


def test_scaled_8_bit_t5(tmp_path) -> None:
    state = random_t5()
    key = "encoder.block.0.layer.0.SelfAttention.q"
    state[f"{key}.weight"] = state[f"{key}.weight"].to(torch.float8_e4m3fn)
    state[f"{key}.scale_weight"] = torch.tensor(0.25)
    save_file_atomic(state, tmp_path / "t.safetensors")
    model = load_t5xxl(tmp_path / "t.safetensors", torch.float32, "cpu")
    assert torch.equal(model.state_dict()[f"{key}.weight"], state[f"{key}.weight"].float() * 0.25)


def test_heads_that_the_width_does_not_tell(tmp_path) -> None:
    save_file_atomic(random_clip(width=48), tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="heads"):
        inspect_clip_l(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="heads is 5"):
        inspect_clip_l(tmp_path / "c.safetensors", {"heads": 5})
    assert load_clip_l(tmp_path / "c.safetensors", None, "cpu", config={"heads": 3}).config.num_attention_heads == 3


def test_wrong_files_are_named(tmp_path) -> None:
    tiny = build_tiny_flux(tmp_path)
    with pytest.raises(CheckpointError, match="no CLIP text encoder"):
        load_clip_l(tiny.t5xxl, None, "cpu")
    with pytest.raises(CheckpointError, match="no T5 v1.1 encoder"):
        load_t5xxl(tiny.clip_l, None, "cpu")
    umt5 = random_t5() | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(32, 2)}
    save_file_atomic(umt5, tmp_path / "u.safetensors")
    with pytest.raises(CheckpointError, match="umT5"):
        load_t5xxl(tmp_path / "u.safetensors", None, "cpu")
    broken = random_clip()
    del broken["text_model.encoder.layers.1.mlp.fc2.bias"]
    save_file_atomic(broken, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="layers.1.mlp.fc2.bias"):
        load_clip_l(tmp_path / "b.safetensors", None, "cpu")


@torch.no_grad()
def test_a_ready_mask_is_what_transformers_makes_of_a_short_one() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for encoder, causal in ((t5_reference(), False), (clip_reference().text_model, True)):
        made = encoder(input_ids=IDS, attention_mask=mask).last_hidden_state
        ready = encoder(input_ids=IDS, attention_mask=ready_mask(IDS, mask, causal=causal)).last_hidden_state
        torch.testing.assert_close(ready[mask.bool()], made[mask.bool()])
    assert attended(t5_reference(), IDS, mask) is mask, "on the CPU values are looked at for nothing"
    on_device = attended(t5_reference(), IDS.to("meta"), mask.to("meta"))
    assert on_device.shape == (2, 1, 6, 6)

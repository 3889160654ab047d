"""Anima's denoiser: sizes from shapes, the key table, the `net.` prefix, other adapters, and the model of diffusers."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library import anima_utils
from library.anima_models import AdapterParams, Anima, AnimaParams
from library.checkpoints.loading import build_on_meta
from library.core.errors import CheckpointError
from library.safetensors_utils import load_safetensors, read_header, save_file_atomic
from tests.tiny import random_state

KEY_TABLES = Path(__file__).parents[1] / "golden" / "checkpoints"
PARAMS = AnimaParams(
    in_channels=4, out_channels=4, model_channels=48, num_blocks=3, num_heads=2, mlp_ratio=2.0, context_dim=20,
    adaln_lora_dim=8,
    adapter=AdapterParams(source_dim=12, target_dim=20, model_dim=20, num_layers=2, num_heads=2, vocab=30, mlp_hidden=40),
)  # fmt: skip


def tiny_state(params: AnimaParams = PARAMS, seed: int = 1) -> dict[str, torch.Tensor]:
    return random_state(build_on_meta(lambda: Anima(params)), torch.Generator().manual_seed(seed))


def write(path: Path, state: dict[str, torch.Tensor], prefix: str = "net.") -> Path:
    save_file_atomic({prefix + key: tensor for key, tensor in state.items()}, path)
    return path


def example(params: AnimaParams = PARAMS) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, params.in_channels, 1, 6, 10, generator=generator)
    return latents, torch.tensor([0.2, 0.9]), torch.randn(2, 7, params.context_dim, generator=generator)


def test_full_size_model_has_the_keys_and_shapes_of_the_real_file() -> None:
    with gzip.open(KEY_TABLES / "anima.json.gz", "rt") as file:
        table = {key: shape for key, shape in json.load(file).items() if "pos_embedder." not in key}
    model = build_on_meta(lambda: Anima(AnimaParams(adapter=AdapterParams())))
    assert {anima_utils.FILE_PREFIX + key: list(tensor.shape) for key, tensor in model.state_dict().items()} == table


@pytest.mark.parametrize("prefix", ["net.", "", "model.diffusion_model.", "diffusion_model."])
def test_every_prefix_loads_and_sizes_come_from_shapes(tmp_path: Path, prefix: str) -> None:
    state = tiny_state()
    state["pos_embedder.seq"] = torch.arange(4.0)
    model = anima_utils.load_anima(write(tmp_path / "a.safetensors", state, prefix), None, "cpu")
    assert model.params == PARAMS
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_saving_keeps_the_prefix_and_casts(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", tiny_state())
    model = anima_utils.load_anima(source, torch.float32, "cpu")
    anima_utils.save_anima(model, tmp_path / "b.safetensors", torch.bfloat16)
    infos, metadata = read_header(tmp_path / "b.safetensors")
    assert set(infos) == set(read_header(source)[0]) and metadata["format"] == "pt"
    saved = load_safetensors(tmp_path / "b.safetensors", "cpu")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "words"), [("missing", "are missing"), ("extra", "are unknown"), ("shape", "shapes do not fit")]
)
def test_a_file_that_does_not_fit_is_an_error(tmp_path: Path, change: str, words: str) -> None:
    state = tiny_state()
    if change == "missing":
        del state["blocks.1.mlp.layer2.weight"]
    elif change == "extra":
        state["blocks.1.mlp.layer3.weight"] = torch.zeros(2)
    else:
        state["blocks.2.mlp.layer2.weight"] = torch.zeros(48, 7)
    with pytest.raises(CheckpointError, match=words):
        anima_utils.load_anima(write(tmp_path / "a.safetensors", state), torch.float32, "cpu")


def test_adapter_of_another_file_replaces_the_models_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", tiny_state())
    other = tiny_state(seed=9)
    alone = {
        key.removeprefix("llm_adapter."): tensor for key, tensor in other.items() if key.startswith("llm_adapter.")
    }
    for name, given in (
        ("whole", write(tmp_path / "w.safetensors", other)),
        ("alone", write(tmp_path / "l.safetensors", alone, "")),
    ):
        model = anima_utils.load_anima(path, torch.float32, "cpu", llm_adapter_path=given)
        torch.testing.assert_close(model.llm_adapter.embed.weight, other["llm_adapter.embed.weight"], msg=name)
        torch.testing.assert_close(model.blocks[0].mlp.layer1.weight, tiny_state()["blocks.0.mlp.layer1.weight"])


def test_a_file_without_adapter_takes_language_states_as_they_are(tmp_path: Path) -> None:
    params = replace(PARAMS, adapter=None)
    model = anima_utils.load_anima(write(tmp_path / "a.safetensors", tiny_state(params)), torch.float32, "cpu")
    assert not model.has_adapter
    latents, times, context = example()
    plain = model(latents, times, context)
    assert torch.equal(plain, model(latents, times, context, target_ids=torch.zeros(2, 7, dtype=torch.long)))


def test_padding_and_batch_mates_do_not_change_a_context() -> None:
    model = Anima(PARAMS)
    model.load_state_dict(tiny_state())
    ids, states = torch.tensor([[5, 6, 1]]), torch.randn(1, 4, 12)
    alone = model.llm_adapter(states, ids, torch.ones(1, 3), torch.ones(1, 4))
    padded_ids, mask = (
        torch.tensor([[5, 6, 1, 0, 0], [7, 8, 9, 2, 1]]),
        torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    )
    padded_states = torch.cat((states, torch.full((1, 2, 12), 9.0)), dim=1).repeat(2, 1, 1)
    source_mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    together = model.llm_adapter(padded_states, padded_ids, mask, source_mask)
    torch.testing.assert_close(together[:1, :3], alone)
    assert together[0, 3:].abs().max() == 0


def test_a_caption_without_tokens_gives_numbers() -> None:
    model = Anima(PARAMS)
    model.load_state_dict(tiny_state())
    context = model.llm_adapter(
        torch.zeros(1, 4, 12), torch.tensor([[1, 0, 0]]), torch.tensor([[1, 0, 0]]), torch.zeros(1, 4)
    )
    assert context.isfinite().all() and context[0, 0].abs().max() > 0


def test_the_time_is_not_rounded_in_half_precision() -> None:
    model = Anima(PARAMS)
    model.load_state_dict(tiny_state())
    model.bfloat16()
    latents, _, context = example()
    near = [
        model(latents.bfloat16(), torch.full((2,), time), context) for time in (0.9375, 0.9385)
    ]  # one number in bfloat16
    assert not torch.equal(*near)


def diffusers_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our keys under the names of diffusers' Cosmos transformer."""
    replacements = (
        ("x_embedder.proj.1", "patch_embed.proj"), ("t_embedder.1.", "time_embed.t_embedder."),
        ("t_embedding_norm", "time_embed.norm"),
        ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
        ("final_layer.adaln_modulation.2", "norm_out.linear_2"),
        ("final_layer.linear", "proj_out"), ("adaln_modulation_self_attn.", "norm1.linear_"),
        ("adaln_modulation_cross_attn.", "norm2.linear_"), ("adaln_modulation_mlp.", "norm3.linear_"),
        ("self_attn", "attn1"),
        ("cross_attn", "attn2"), ("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"),
        ("output_proj", "to_out.0"),
        ("q_norm", "norm_q"), ("k_norm", "norm_k"), ("mlp.layer1", "ff.net.0.proj"), ("mlp.layer2", "ff.net.2"),
    )  # fmt: skip
    renamed = {}
    for key, tensor in state.items():
        if not key.startswith("llm_adapter."):
            for ours, theirs in replacements:
                key = key.replace(ours, theirs)
            renamed["transformer_" + key if key.startswith("blocks.") else key] = tensor
    return renamed


def test_denoiser_agrees_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.CosmosTransformer3DModel(
        in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=3, mlp_ratio=2.0,
        text_embed_dim=20,
        adaln_lora_dim=8, max_size=(1, 32, 32), patch_size=(1, 2, 2), rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip
    state = tiny_state()
    reference.load_state_dict(diffusers_names(state))
    model = Anima(PARAMS)
    model.load_state_dict(state)
    latents, times, context = example()
    with torch.no_grad():
        ours = model(latents, times, context)
        with_mask = torch.cat((latents, torch.zeros_like(latents[:, :1])), dim=1)
        theirs = reference.eval()(with_mask, times, context, return_dict=False)[0]
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


def test_checkpointing_and_block_limits() -> None:
    model = Anima(PARAMS)
    model.load_state_dict(tiny_state())
    latents, times, context = example()
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.train()
            model.enable_gradient_checkpointing()
        model(latents, times, context).square().mean().backward()
        grads.append(model.blocks[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="at most 1 can be swapped"):
        model.enable_block_swap(2, torch.device("cpu"))


def test_eight_bit_storage_keeps_the_adapter_and_the_modulation_wide(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", tiny_state())
    model = anima_utils.load_anima(path, torch.float8_e4m3fn, "cpu")
    kinds = {name: weight.dtype for name, weight in model.named_parameters()}
    assert kinds["blocks.0.self_attn.q_proj.weight"] == kinds["blocks.0.mlp.layer1.weight"] == torch.float8_e4m3fn
    assert {kinds[name] for name in kinds if "adaln" in name or "llm_adapter" in name or "norm" in name} == {
        torch.bfloat16
    }
    latents, times, context = example()
    assert model(latents, times, context).isfinite().all()

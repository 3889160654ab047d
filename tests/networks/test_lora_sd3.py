"""Adapters of SD3: layers at real size, ranks by part, names in files of other programs, the same output in
diffusers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.checkpoints.sd3_convert import convert_sd3_to_diffusers
from library.core.errors import ConfigError
from library.sd3_models import MMDiT, SD3Params
from networks.files.lora_conversion import to_diffusers
from networks.lora_sd3 import create_network
from tests.golden_tests.test_lora_names import clip
from tests.library.test_sd3_utils import REAL
from tests.tiny import random_state

NO_TEXT = [None, None, None]


def network_of(params: SD3Params, text_encoders=NO_TEXT, **arguments):
    with torch.device("meta"):
        return create_network(1.0, 4, 1.0, None, text_encoders, MMDiT(params), **arguments)


def shapes(network) -> dict[str, list[list[int]]]:
    tensors = network.file_state_dict()
    return {
        lora.lora_name: [list(tensors[f"{lora.lora_name}.{key}.weight"].shape) for key in ("lora_down", "lora_up")]
        for lora in network.loras
    }


@pytest.mark.parametrize("name, count", [("sd3_medium", 237), ("sd35_medium", 263), ("sd35_large", 377)])
def test_layers_of_the_real_models(name: str, count: int) -> None:
    params = REAL[name][1]
    found, hidden = shapes(network_of(params)), params.hidden_size
    assert len(found) == count
    block = "lora_unet_joint_blocks_0_"
    assert found[f"{block}context_block_attn_qkv"] == [[4, hidden], [3 * hidden, 4]]
    assert found[f"{block}x_block_mlp_fc2"] == [[4, 4 * hidden], [hidden, 4]]
    chunks = 9 if params.x_block_self_attn_layers else 6
    assert found[f"{block}x_block_adaLN_modulation_1"] == [[4, hidden], [chunks * hidden, 4]]
    last = f"lora_unet_joint_blocks_{params.depth - 1}_context_block_"
    assert found[f"{last}adaLN_modulation_1"][1] == [2 * hidden, 4] and f"{last}attn_proj" not in found


def test_text_encoders_and_their_prefixes() -> None:
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=8,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=1,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )
        encoders = [clip(768, 1, 12), clip(1280, 1, 20), t5]
    params = SD3Params(depth=1)
    names = set(shapes(network_of(params, encoders)))
    assert {name.split("_")[1] for name in names} == {"unet", "te1", "te2"}
    found = shapes(network_of(params, encoders, train_t5xxl="True"))
    assert found["lora_te3_encoder_block_0_layer_0_SelfAttention_q"] == [[4, 4096], [4096, 4]]
    assert found["lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0"] == [[4, 4096], [10240, 4]]
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj" in found


def test_ranks_by_part_blocks_and_layers_outside_them() -> None:
    params = SD3Params(depth=3, qk_norm="rms", x_block_self_attn_layers=(0,))
    dims = {
        "context_attn_dim": 1,
        "context_mlp_dim": 2,
        "context_mod_dim": 3,
        "x_attn_dim": 5,
        "x_mlp_dim": 6,
        "x_mod_dim": 0,
    }
    found = {
        name: down[0] for name, (down, _) in shapes(network_of(params, **{k: str(v) for k, v in dims.items()})).items()
    }
    block = "lora_unet_joint_blocks_0_"
    assert {found[f"{block}context_block_{part}"] for part in ("attn_qkv", "attn_proj")} == {1}
    assert found[f"{block}context_block_mlp_fc1"] == 2 and found[f"{block}context_block_adaLN_modulation_1"] == 3
    assert {found[f"{block}x_block_{part}"] for part in ("attn_qkv", "attn2_qkv", "attn2_proj")} == {5}
    assert found[f"{block}x_block_mlp_fc2"] == 6 and f"{block}x_block_adaLN_modulation_1" not in found
    outside = {"context_embedder": 1, "t_embedder_mlp_0": 2, "t_embedder_mlp_2": 2, "y_embedder_mlp_0": 3,
               "y_embedder_mlp_2": 3, "final_layer_adaLN_modulation_1": 5, "final_layer_linear": 6}  # fmt: skip
    network = shapes(network_of(params, emb_dims="[1,2,0,3,5,6]", train_block_indices="1"))
    assert {name for name in network if "joint_blocks_1_" not in name} == {f"lora_unet_{name}" for name in outside}
    assert all(network[f"lora_unet_{name}"][0][0] == rank for name, rank in outside.items())
    patch = shapes(network_of(params, emb_dims="[0,0,4,0,0,0]", train_block_indices="none"))
    assert patch == {"lora_unet_x_embedder_proj": [[4, 16, 2, 2], [1536, 4, 1, 1]]}
    with pytest.raises(ConfigError, match="train_block_indices"):
        network_of(params, train_block_indices="5")


# -- in diffusers ------------------------------------------------------------------------------------------------------


def twins(depth: int, variant: dict) -> tuple[nn.Module, MMDiT]:
    """The same random SD3 as the class of diffusers and as ours."""
    diffusers = pytest.importorskip("diffusers")
    params = SD3Params(
        depth=depth, hidden_size=32, num_heads=2, pos_embed_max_size=8, adm_in_channels=20, context_in=24, **variant
    )
    ours = MMDiT(params).eval()
    ours.load_state_dict(random_state(ours, torch.Generator().manual_seed(0)))
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=depth, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, out_channels=16,
        pos_embed_max_size=8, dual_attention_layers=params.x_block_self_attn_layers,
        qk_norm=params.qk_norm and "rms_norm",
    ).eval()  # fmt: skip
    theirs.load_state_dict(convert_sd3_to_diffusers(ours.state_dict()))
    return theirs, ours


@torch.no_grad()
def outputs(theirs: nn.Module, ours: MMDiT) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 16, 8, 12, generator=generator), torch.randn(2, 20, generator=generator)
    context, times = torch.randn(2, 5, 24, generator=generator), torch.tensor([200.0, 900.0])
    other = theirs(
        hidden_states=x, encoder_hidden_states=context, pooled_projections=y, timestep=times, return_dict=False
    )
    return other[0], ours(x, times, y, context)


@pytest.mark.parametrize("depth", [3, 24])
@pytest.mark.parametrize("arguments", [{}, {"split_qkv": "true"}, {"emb_dims": "[2,2,2,2,2,2]"}], ids=str)
def test_a_rewritten_file_changes_the_output_as_our_own_forward(depth: int, arguments: dict[str, str]) -> None:
    theirs, ours = twins(depth, {"qk_norm": "rms", "x_block_self_attn_layers": (0, 1)})
    plain_theirs, plain_ours = outputs(theirs, ours)
    torch.testing.assert_close(plain_theirs, plain_ours, rtol=1e-4, atol=1e-4)
    network = create_network(1.0, 4, 2.0, None, NO_TEXT, ours, **arguments)
    for lora in network.unet_loras:
        for up in lora.lora_up.parameters():
            nn.init.normal_(up, std=0.3 / depth)
    network.apply_to(NO_TEXT, ours, True, True)
    rewritten = to_diffusers("sd3", network.file_state_dict())
    theirs.load_lora_adapter(rewritten, prefix="transformer")
    with_theirs, with_ours = outputs(theirs, ours)
    assert (with_ours - plain_ours).abs().max() > 0.1
    torch.testing.assert_close(with_theirs, with_ours, rtol=1e-4, atol=1e-4)
    loaded = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert len(loaded) == sum(key.endswith("lora_A.weight") for key in rewritten)

"""Limits of block swap, and checkpoints; tests/library/components/test_block_ring.py has the swap itself."""

from __future__ import annotations

import pytest
import torch

from library.custom_offloading_utils import row_swap_problem
from library.flux_models import Flux, FluxParams, block_swap_problem, split_blocks_to_swap

PARAMS = FluxParams(
    in_channels=16, vec_in_dim=8, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=5,
    depth_single_blocks=7, axes_dim=(4, 6, 6), guidance_embed=False,
)  # fmt: skip


def make_model(seed: int = 0) -> Flux:
    torch.manual_seed(seed)
    model = Flux(PARAMS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False).train()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "img": torch.randn(2, 6, 16, generator=generator), "img_ids": torch.zeros(2, 6, 3),
        "txt": torch.randn(2, 4, 12, generator=generator), "txt_ids": torch.zeros(2, 4, 3),
        "timesteps": torch.tensor([0.2, 0.8]), "y": torch.randn(2, 8, generator=generator),
    }  # fmt: skip


def gradients(model: Flux) -> list[torch.Tensor]:
    """Gradients of the biases, which block swap leaves in place."""
    biases = [block.img_attn.proj.bias for block in model.double_blocks] + [
        block.linear1.bias for block in model.single_blocks
    ]
    for bias in biases:
        bias.requires_grad_(True)
        bias.grad = None
    model(**inputs()).square().mean().backward()
    return [bias.grad.clone() for bias in biases]


def test_swap_on_the_cpu_moves_nothing() -> None:
    model = make_model()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    expected = model(**inputs())
    model.enable_block_swap(2, torch.device("cpu"))
    model.move_to_device_except_swap_blocks(torch.device("cpu"))
    assert torch.equal(model(**inputs()), expected)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize(("depths", "allowed"), [((19, 38), 35), ((5, 7), 4), ((2, 2), 0), ((1, 1), 0), ((20, 10), 8)])
def test_limit_of_blocks_to_swap(depths: tuple[int, int], allowed: int) -> None:
    double, single = split_blocks_to_swap(allowed)
    assert block_swap_problem(allowed, *depths) is None
    assert double <= max(depths[0] - 2, 0) and single <= max(depths[1] - 2, 0)
    message = block_swap_problem(allowed + 1, *depths)
    assert str(allowed + 1) in message and f"at most {allowed}" in message


def test_models_of_clips_keep_one_block_as_known_programs_do() -> None:
    """38 of HunyuanVideo and FramePack, 39 and 29 of the two sizes of Wan."""
    from library.framepack_models import HunyuanVideoTransformer3DModelPacked
    from library.hunyuan_video_models import HYVideoDiffusionTransformer
    from library.wan_models import WanModel

    for model in (HYVideoDiffusionTransformer, HunyuanVideoTransformer3DModelPacked):
        assert block_swap_problem(38, 20, 40, model.blocks_that_stay) is None
        assert "at most 38" in block_swap_problem(39, 20, 40, model.blocks_that_stay)
    for blocks in (30, 40):
        assert row_swap_problem(blocks - 1, blocks, WanModel.blocks_that_stay) is None
        assert f"at most {blocks - 1}" in row_swap_problem(blocks, blocks, WanModel.blocks_that_stay)


def test_too_many_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks_to_swap"):
        make_model().enable_block_swap(9, torch.device("cpu"))


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(cpu_offload: bool) -> None:
    expected = gradients(make_model())
    model = make_model()
    model.enable_gradient_checkpointing(cpu_offload)
    for result, wanted in zip(gradients(model), expected):
        assert torch.equal(result, wanted)

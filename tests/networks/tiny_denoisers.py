"""A tiny random denoiser of every family, and inputs for its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from library.anima_models import Anima, AnimaParams
from library.chroma_models import Chroma, ChromaParams
from library.flux_models import Flux, FluxParams
from library.flux_utils import prepare_img_ids
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.lumina_models import LuminaParams, NextDiT
from library.sd3_models import MMDiT, SD3Params
from library.sd_models import UNet2DConditionModel
from library.sdxl_models import SdxlUNet2DConditionModel
from networks.kinds.targets import targets_of_denoiser
from tests.tiny import random_state
from tests.tiny_sd import tiny_params

BATCH = 2


def _flux() -> nn.Module:
    sizes = {"vec_in_dim": 16, "context_in_dim": 24, "hidden_size": 32, "num_heads": 2, "axes_dim": (4, 6, 6)}
    return Flux(FluxParams(depth=1, depth_single_blocks=1, **sizes))


def _anima() -> nn.Module:
    return Anima(
        AnimaParams(model_channels=48, num_blocks=2, num_heads=2, mlp_ratio=2.0, context_dim=24, adaln_lora_dim=8)
    )


def _lumina() -> nn.Module:
    """Its q/k norms have the eps of diffusers."""
    return NextDiT(LuminaParams(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=2, ffn_hidden=192, axes_dims=(4, 4, 4),
        cap_feat_dim=24, time_dim=48, qk_norm_eps=1e-5,
    ))  # fmt: skip


def _sd3() -> nn.Module:
    sizes = {"hidden_size": 32, "num_heads": 2, "mlp_ratio": 2.0, "context_in": 24, "adm_in_channels": 16}
    return MMDiT(SD3Params(depth=2, qk_norm="rms", x_block_self_attn_layers=(0,), pos_embed_max_size=8, **sizes))


def _chroma() -> nn.Module:
    sizes = {"context_in_dim": 24, "hidden_size": 32, "num_heads": 2, "axes_dim": (4, 6, 6), "approximator_in_dim": 32}
    return Chroma(ChromaParams(
        depth=1, depth_single_blocks=1, approximator_hidden_size=24, approximator_depth=1, **sizes
    ))  # fmt: skip


def _hunyuan_image() -> nn.Module:
    sizes = {"hidden_size": 32, "num_heads": 2, "rope_dim_list": (8, 8), "text_dim": 24, "byt5_dim": 16, "byt5_mid": 16}
    return HYImageDiffusionTransformer(HYImageParams(in_channels=16, depth=1, depth_single=1, refiner_depth=1, **sizes))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _unet_inputs(model: nn.Module) -> tuple[Any, ...]:
    params = model.params
    inputs = (_normal(BATCH, 4, 8, 8), torch.tensor([40, 700]), _normal(BATCH, 5, params.context_dim))
    return inputs if params.adm_in_channels is None else (*inputs, _normal(BATCH, params.adm_in_channels))


def _flux_inputs(model: nn.Module) -> tuple[Any, ...]:
    params = model.params
    return (
        _normal(BATCH, 6, params.in_channels), prepare_img_ids(BATCH, 2, 3), _normal(BATCH, 3, params.context_in_dim),
        torch.zeros(BATCH, 3, 3), torch.tensor([0.3, 0.8]), _normal(BATCH, params.vec_in_dim),
        torch.full((BATCH,), 3.5),
    )  # fmt: skip


def _chroma_inputs(model: nn.Module) -> tuple[Any, ...]:
    params = model.params
    return (
        _normal(BATCH, 6, params.in_channels), prepare_img_ids(BATCH, 2, 3), _normal(BATCH, 3, params.context_in_dim),
        torch.zeros(BATCH, 3, 3), torch.tensor([0.3, 0.8]), torch.ones(BATCH, 3),
    )  # fmt: skip


def _anima_inputs(model: nn.Module) -> tuple[Any, ...]:
    return _normal(BATCH, 16, 1, 6, 4), torch.tensor([0.3, 0.8]), _normal(BATCH, 5, model.params.context_dim)


def _hunyuan_image_inputs(model: nn.Module) -> tuple[Any, ...]:
    params = model.params
    return (
        _normal(BATCH, params.in_channels, 2, 3), torch.tensor([300.0, 800.0]), _normal(BATCH, 3, params.text_dim),
        torch.tensor([[1, 1, 1], [1, 1, 0]]), _normal(BATCH, 2, params.byt5_dim), torch.tensor([[1, 0], [0, 0]]),
    )  # fmt: skip


def _lumina_inputs(model: nn.Module) -> tuple[Any, ...]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    return _normal(BATCH, 16, 6, 4), torch.tensor([0.3, 0.8]), _normal(BATCH, 5, model.params.cap_feat_dim), mask


def _sd3_inputs(model: nn.Module) -> tuple[Any, ...]:
    params = model.params
    text = _normal(BATCH, 5, params.context_in)
    return _normal(BATCH, 16, 6, 4), torch.tensor([300.0, 800.0]), _normal(BATCH, params.adm_in_channels), text


DENOISERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], tuple[Any, ...]]]] = {
    "sd": (lambda: UNet2DConditionModel(tiny_params("sd1")), _unet_inputs),
    "sdxl": (lambda: SdxlUNet2DConditionModel(tiny_params("sdxl")), _unet_inputs),
    "sd3": (_sd3, _sd3_inputs),
    "flux": (_flux, _flux_inputs),
    "anima": (_anima, _anima_inputs),
    "hunyuan_image": (_hunyuan_image, _hunyuan_image_inputs),
    "chroma": (_chroma, _chroma_inputs),
    "lumina": (_lumina, _lumina_inputs),
}


def tiny_denoiser(family: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """(the model with random weights, its inputs)."""
    build, inputs = DENOISERS[family]
    model = build()
    model.load_state_dict(random_state(model, torch.Generator().manual_seed(0)))
    assert targets_of_denoiser(model).family == family
    return model.requires_grad_(False), inputs(model)

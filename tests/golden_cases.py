"""How the outputs of each reference file are computed by this code base.

CASES: name of a reference file -> function (weights, inputs, config) -> outputs. All dicts are keyed as in the file,
without the prefixes weights/, input/ and output/. Every model goes through a checkpoint file and its loader.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.safetensors_utils import save_file_atomic

Tensors = dict[str, Tensor]
FLOW_SHIFTS = (1.0, 1.15, 3.0, 5.0, 6.0)
FLUX_AXES = (16, 56, 56)
ANIMA_GRID, ANIMA_TEXT = (1, 3, 5), 6


def _loaded(load: Callable[..., Any], weights: Tensors, config: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file_atomic(weights, path)
        return load(path, torch.float32, "cpu", disable_mmap=True, config=config)


@torch.no_grad()
def flux(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.flux_utils import load_flux

    model = _loaded(load_flux, weights, config)
    given = dict(inputs)
    mask = given.pop("txt_attention_mask")
    return {"out": model(**given), "out_masked": model(**given, txt_attention_mask=mask)}


@torch.no_grad()
def chroma(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    """The guidance of the file is 0, which the model knows by itself."""
    from library.chroma_utils import load_chroma

    model = _loaded(load_chroma, weights, config)
    given = {name: tensor for name, tensor in inputs.items() if name != "guidance"}
    return {"mod_vectors": model.modulation_vectors(inputs["timesteps"]), "out": model(**given)}


@torch.no_grad()
def vae_ldm16(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.flux_utils import load_ae

    vae = _loaded(load_ae, weights, config)
    mean, logvar = vae.encode_moments(inputs["image"])
    return {
        "mean": mean,
        "logvar": logvar,
        "scaled_latent": vae.encode(inputs["image"]),
        "decoded": vae.decode(vae.scale(inputs["latent"])),  # the file holds raw latents
    }


@torch.no_grad()
def vae_ldm4(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.sd_utils import load_vae_sd

    vae = _loaded(load_vae_sd, weights, config)
    mean, logvar = vae.encode_moments(inputs["image"])
    decoded = vae.decode(vae.scale(inputs["latent"]))  # the file holds raw latents
    return {"mean": mean, "logvar": logvar, "scaled_latent": vae.encode(inputs["image"]), "decoded": decoded}


@torch.no_grad()
def unet_sd(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.sd_utils import load_unet_sd

    model = _loaded(load_unet_sd, weights, config)
    return {"out": model(inputs["sample"], inputs["timesteps"], inputs["context"])}


@torch.no_grad()
def unet_sdxl(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.sdxl_utils import load_unet_sdxl

    model = _loaded(load_unet_sdxl, weights, config)
    return {"out": model(inputs["sample"], inputs["timesteps"], inputs["context"], inputs["y"])}


@torch.no_grad()
def lllite_sdxl(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    """The U-Net without and with the modules at two strengths, and one module alone at the lower one."""
    from library.components.lllite_utils import load_lllite
    from library.sdxl_utils import load_unet_sdxl

    parts = {
        part: {key.removeprefix(f"{part}/"): tensor for key, tensor in weights.items() if key.startswith(f"{part}/")}
        for part in ("unet", "lllite")
    }
    unet = _loaded(load_unet_sdxl, parts["unet"], config["unet"])
    names = ("sample", "timesteps", "context", "y")
    found = {"unet_alone": unet(*(inputs[name] for name in names))}
    net = _loaded(lambda path, dtype, device, **_: load_lllite(path, unet, dtype, device), parts["lllite"], config)
    net.set_picture(inputs["conditioning_image"])
    for multiplier in config["multipliers"]:
        net.state.multiplier = multiplier
        found[f"unet_scale_{multiplier}"] = unet(*(inputs[name] for name in names))
    [one] = [part for part in net.parts if part.lllite_name == config["one_module"]]
    net.state.multiplier = 0.5
    return {**found, "one_embedding": one.embedding(), "one_scale_0.5": one.layer(inputs["one_input"])}


@torch.no_grad()
def clip_g(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    """What peers make of the projection stored the other way round is not computed."""
    from library.components.text_encoder_utils import CLIP_G, load_clip, pool_at_first_eos

    values = {**config, "act": "gelu"}
    model = _loaded(lambda path, *rest, **more: load_clip(path, CLIP_G, *rest, **more), weights, values)
    result = model(inputs["ids"], output_hidden_states=True)
    pooled = pool_at_first_eos(result.last_hidden_state, inputs["ids"], config["eos"])
    norm = model.text_model.final_layer_norm
    return {
        "last_normed": result.last_hidden_state,
        "penultimate_normed": norm(result.hidden_states[-2]),
        "penultimate_raw": result.hidden_states[-2],
        "pooled_before_projection": pooled,
        "pooled_projected": model.text_projection(pooled),
    }


@torch.no_grad()
def clip_l(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.components.text_encoder_utils import load_clip_l
    from library.strategy_flux import pool_at_first_eos

    model = _loaded(load_clip_l, weights, config)
    result = model(inputs["ids"], output_hidden_states=True)
    norm, hidden = model.text_model.final_layer_norm, result.hidden_states
    pooled = pool_at_first_eos(model, inputs["ids"], config["eos"])
    return {
        "clip_skip_none": result.last_hidden_state,
        "clip_skip_1": norm(hidden[-1]),
        "clip_skip_2": norm(hidden[-2]),
        "hidden_last_minus_1_raw": hidden[-2],
        "pooled": pooled,
        "pooled_projected": model.text_projection(pooled),
    }


@torch.no_grad()
def te_t5xxl(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.components.text_encoder_utils import load_t5xxl

    model = _loaded(load_t5xxl, weights, config)
    return {
        "last_hidden_state": model(inputs["ids"], attention_mask=inputs["mask"]).last_hidden_state,
        "last_hidden_state_no_mask": model(inputs["ids"]).last_hidden_state,
    }


@torch.no_grad()
def sd3(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.sd3_utils import load_sd3

    return {"out": _loaded(load_sd3, weights, {})(**inputs)}  # shapes tell all


@torch.no_grad()
def anima(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.anima_utils import load_anima

    model = _loaded(load_anima, weights, config)
    text = {name: inputs[name] for name in ("target_ids", "target_mask", "source_mask")}
    context = model.llm_adapter(inputs["source_hidden_states"], **text)
    given = (inputs["x"], inputs["timesteps"])
    whole = model(*given, inputs["source_hidden_states"], inputs["padding_mask"], **text)
    assert torch.equal(whole, model(*given, context, inputs["padding_mask"]))
    return {"context": context, "out": whole}


@torch.no_grad()
def vae_wan(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.components.wan_vae_utils import load_wan_vae

    statistics = {name: inputs[name].tolist() for name in ("latents_mean", "latents_std")}
    vae = _loaded(load_wan_vae, weights, {**config, **statistics})
    outputs = {}
    for kind in ("image", "video"):
        outputs[f"mean_{kind}"] = vae.encode_mean(inputs[kind])
        outputs[f"normalized_{kind}"] = vae.encode(inputs[kind])
        outputs[f"decoded_{kind}"] = vae.decode_raw(inputs[f"latent_{kind}"])
    return outputs


@torch.no_grad()
def te_qwen3(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.components.llm_encoder_utils import load_qwen3

    model = _loaded(load_qwen3, weights, config)
    result = model(inputs["ids"], attention_mask=inputs["mask"], output_hidden_states=True)
    return {"hidden_minus_2": result.hidden_states[-2], "last_hidden_state": result.last_hidden_state}


@torch.no_grad()
def wan(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    """Text to video, and with pictures, whose latents `y` and states `clip_fea` stand beside the text."""
    from library.wan_utils import load_wan

    model = _loaded(load_wan, weights, config)
    rows = torch.arange(inputs["context"].shape[1]) < inputs["context_lens"][:, None]
    text = inputs["context"] * rows[..., None]  # padding is 0
    beside = {name: inputs[name] for name in ("y", "clip_fea") if name in inputs}
    return {"out": model(inputs["x"], inputs["t"], text, **beside)}


@torch.no_grad()
def te_umt5(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    """Both layouts of the file give the same encoder."""
    from library.wan_text_encoder_utils import load_umt5

    model = _loaded(load_umt5, weights, {})
    layout = "hf_layout/"
    other = {key.removeprefix(layout): tensor for key, tensor in inputs.items() if key.startswith(layout)}
    same = _loaded(load_umt5, other, {})
    given = (inputs["ids"], inputs["mask"])
    states = model(*given).last_hidden_state
    assert torch.equal(states, same(*given).last_hidden_state)
    return {"last_hidden_state": states}


@torch.no_grad()
def hunyuan_image(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.hunyuan_image_utils import load_hunyuan_image

    model = _loaded(load_hunyuan_image, weights, config)
    names = ("x", "t", "txt", "txt_mask", "byt5", "byt5_mask")
    return {"out": model(*(inputs[name] for name in names))}


@torch.no_grad()
def hunyuan_video(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    """The positions of the reference stand twice."""
    from library.hunyuan_video_utils import load_hunyuan_video

    model = _loaded(load_hunyuan_video, weights, config)
    names = ("x", "t", "txt", "txt_mask", "vec")
    result = model(*(inputs[name] for name in names), guidance=inputs["guidance"])
    grid = tuple(size // step for size, step in zip(inputs["x"].shape[2:], config["patch_size"]))
    cos, sin = (table[0].repeat_interleave(2, dim=-1) for table in model.rope(grid, result.device))
    return {"out": result, "rope_cos": cos, "rope_sin": sin}


@torch.no_grad()
def framepack(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.framepack_models import CleanFrames
    from library.framepack_utils import load_framepack

    model = _loaded(load_framepack, weights, config)
    near, middle, far = (
        (inputs[f"clean_latents{scale}"], inputs[f"clean_latent{scale}_indices"]) for scale in ("", "_2x", "_4x")
    )
    names = ("x", "t", "txt", "txt_mask", "pooled", "image_embeddings", "latent_indices")
    clean = CleanFrames(near=near, middle=middle, far=far)
    return {"out": model(*(inputs[name] for name in names), clean, guidance=inputs["guidance"])}


@torch.no_grad()
def vae_hunyuan_image(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.hunyuan_image_utils import load_vae

    vae = _loaded(load_vae, weights, config)
    mean, logvar = vae.encode_moments(inputs["image"])
    factor = vae.params.scaling_factor
    assert factor == config["scaling_factor"] and vae.params.spatial_stride == config["spatial_factor"]
    return {"mean": mean, "logvar": logvar, "decoded": vae.decode(inputs["latent"] * factor)}


@torch.no_grad()
def vae_hunyuan_video(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    """What the reference decodes is not scaled."""
    from library.components.hunyuan_vae_utils import load_hunyuan_vae

    vae = _loaded(load_hunyuan_vae, weights, config)
    factor = vae.params.scaling_factor
    assert factor == config["scaling_factor"]
    mean, logvar = vae.encode_moments(inputs["video"])
    return {
        "mean_video": mean,
        "logvar_video": logvar,
        "mean_image": vae.encode_moments(inputs["image"])[0],
        **{f"decoded_{name}": vae.decode(inputs[f"latent_{name}"] * factor) for name in ("video", "image")},
    }


@torch.no_grad()
def te_llama(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.components.llm_encoder_utils import load_llama

    model = _loaded(load_llama, weights, config)
    result = model(inputs["ids"], attention_mask=inputs["mask"], output_hidden_states=True)
    return {"hidden_minus_3": result.hidden_states[-3], "last_hidden_state": result.last_hidden_state}


@torch.no_grad()
def te_qwen25vl(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.components.llm_encoder_utils import load_qwen25_vl

    model = _loaded(load_qwen25_vl, weights, config)
    result = model(inputs["ids"], attention_mask=inputs["mask"], output_hidden_states=True)
    return {"hidden_minus_3": result.hidden_states[-3], "last_hidden_state": result.last_hidden_state}


@torch.no_grad()
def lumina2(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.lumina_utils import load_lumina

    model = _loaded(load_lumina, weights, config)
    return {"out": model(**inputs)}


@torch.no_grad()
def te_gemma2(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.components.gemma_encoder_utils import load_gemma2

    model = _loaded(load_gemma2, weights, config)
    result = model(inputs["ids"], attention_mask=inputs["mask"], output_hidden_states=True)
    return {"hidden_minus_2": result.hidden_states[-2], "last_hidden_state": result.last_hidden_state}


def numeric(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    """The numeric parts that the families use."""
    from library.anima_models import AnimaParams, cos_sin, image_angles, text_angles
    from library.attention import rope_cos_sin, timestep_embedding
    from library.flux_utils import pack_latents, prepare_img_ids
    from library.lumina_models import LuminaParams
    from library.sd3_models import get_2d_sincos_pos_embed, scaled_positions
    from library.training.timesteps import MU_LINES, line_mu, shift_sigmas

    latents, sigmas, tokens = inputs["flux/latent"], inputs["flow/sigma"], inputs["flow/flux_seq_len"]
    img_ids = prepare_img_ids(latents.shape[0], latents.shape[2] // 2, latents.shape[3] // 2)
    rope = torch.stack(rope_cos_sin(img_ids[:1], FLUX_AXES, 10000), dim=-1)[0]  # [L, D/2, 2]
    lumina_rope = rope_cos_sin(inputs["lumina/positions"][None], LuminaParams().axes_dims, LuminaParams().theta)
    return {
        "flux_img_ids": img_ids,
        "flux_packed": pack_latents(latents),
        "chroma_mod_index_32": timestep_embedding(torch.arange(344), 32),
        "flux_shift_mu": torch.tensor([line_mu(count, MU_LINES["flux_shift"]) for count in tokens.tolist()]),
        "rope_flux_cos_sin": rope,
        "time_flux_256": timestep_embedding(inputs["time/unit"], 256),
        "rope_anima_angles": image_angles(*ANIMA_GRID, AnimaParams()),
        "rope_anima_adapter_cos": cos_sin(text_angles(ANIMA_TEXT, 64))[0],
        "rope_anima_adapter_sin": cos_sin(text_angles(ANIMA_TEXT, 64))[1],
        "time_sd3_256": timestep_embedding(inputs["time/scaled"], 256, 1.0),
        "sd3_pos_embed_12x12_dim64": get_2d_sincos_pos_embed(64, 12),
        "sd3_scaled_pos_embed_grid9_sample6_dim64": scaled_positions(64, (9, 9), (0, 0), side=6)[0],
        "time_anima_64": timestep_embedding(inputs["time/unit"], 64, 1.0),
        **hunyuan_image_numbers(inputs),
        **wan_numbers(inputs),
        "time_lumina_256": timestep_embedding(inputs["time/unit"], 256, 1.0),
        **{f"rope_lumina_{name}": table[0] for name, table in zip(("cos", "sin"), lumina_rope)},
        **{f"flow_shift_{shift}": shift_sigmas(sigmas, shift) for shift in FLOW_SHIFTS},
        **noise_schedule(inputs),
        **snr_weights(inputs),
    }


def hunyuan_image_numbers(inputs: Tensors) -> Tensors:
    """Positions, whose values stand twice in the reference, and the sinusoid of times on the 0..1000 scale."""
    from library.attention import timestep_embedding
    from library.components.hunyuan_stream_models import grid_rope

    cos, sin = (table[0].repeat_interleave(2, dim=-1) for table in grid_rope(ANIMA_GRID[1:], (64, 64), 256))
    times = timestep_embedding(inputs["time/scaled"], 256, 1.0)
    return {"rope_hyimage_cos": cos, "rope_hyimage_sin": sin, "time_hunyuan_256": times}


def wan_numbers(inputs: Tensors) -> Tensors:
    """Positions of two frames, and the sinusoid of times on the 0..1000 scale."""
    from library.attention import rope_cos_sin
    from library.wan_models import ROPE_THETA, WanParams, grid_positions, sinusoids

    cos, sin = rope_cos_sin(grid_positions(torch.arange(2)[None], *ANIMA_GRID[1:]), WanParams().axes_dim, ROPE_THETA)
    return {"rope_wan_cos": cos[0], "rope_wan_sin": sin[0], "time_wan_256": sinusoids(inputs["time/scaled"], 256)}


def noise_schedule(inputs: Tensors) -> Tensors:
    """The schedule of Stable Diffusion, plain and zero-terminal, and the sinusoids of times and sizes."""
    from library.attention import timestep_embedding
    from library.core.keyed_random import StepDraws
    from library.sdxl_train_utils import get_size_embeddings
    from library.training.objective import DdpmObjective

    sizes = (inputs["sdxl/original_hw"], inputs["sdxl/crop_top_left"], inputs["sdxl/target_hw"])
    outputs = {
        "time_sd_320": timestep_embedding(inputs["time/int"], 320, 1.0),
        "sdxl_size_embeddings": get_size_embeddings(*sizes),
    }
    draws = StepDraws(0, 0, [0, 1, 2])
    for name, is_zero in (("sd", False), ("ztsnr", True)):
        objective = DdpmObjective(None, None, prediction_type="v", zero_terminal_snr=is_zero)
        sample = objective.corrupt(inputs["sd/x0"], inputs["sd/noise"], inputs["sd/t"], draws)
        alphas = objective.alphas_cumprod
        outputs |= {
            f"{name}_alphas_cumprod": alphas,
            f"{name}_betas": 1 - alphas / torch.cat((torch.ones(1, dtype=alphas.dtype), alphas[:-1])),
            f"{name}_add_noise": sample.noisy_latents,
            f"{name}_velocity": sample.target,
        }
        if not is_zero:
            outputs["sd_snr"] = objective.snr(torch.arange(1000))
    return outputs


def snr_weights(inputs: Tensors) -> Tensors:
    """Losses times the factors by signal-to-noise ratio."""
    from library.training.loss_weights import snr as factors
    from library.training.objective import DdpmObjective

    loss, snr = inputs["sd/loss"], DdpmObjective(None).snr(inputs["sd/t_loss"])
    return {
        **{f"min_snr_gamma5_vpred{int(is_v)}": loss * factors.min_snr_factor(snr, 5.0, is_v) for is_v in (False, True)},
        **{f"debiased_vpred{int(is_v)}": loss * factors.debiased_factor(snr, True, is_v) for is_v in (False, True)},
        "scale_v_pred_loss": loss * factors.scale_v_factor(snr, True, True),
        "v_pred_like_loss_0.25": loss * factors.v_pred_like_factor(snr, 0.25, False),
    }


def _control_net(
    load: Callable[..., Any], family: str, unet: str, weights: Tensors, config: Mapping[str, Any]
) -> tuple[Any, Any]:
    """(the denoiser, the ControlNet) of a file that holds both."""
    from library.components.control_nets import control_nets_of

    def of(part: str) -> Tensors:
        return {key.removeprefix(f"{part}/"): value for key, value in weights.items() if key.startswith(f"{part}/")}

    denoiser = _loaded(load, of(unet), config[unet])

    def load_net(path: Path, *rest: Any, config: Mapping[str, Any], **more: Any) -> Any:
        return control_nets_of(family).load(path, denoiser.params, *rest, **more)

    return denoiser, _loaded(load_net, of("control_net"), {})


@torch.no_grad()
def _control_net_of_unet(
    load: Callable[..., Any], family: str, weights: Tensors, inputs: Tensors, config: dict[str, Any]
) -> Tensors:
    from library.components.control_models import Control, GuidedBy

    unet, net = _control_net(load, family, "unet", weights, config)
    picture = inputs["conditioning_image"]
    given = [inputs[name] for name in ("sample", "timesteps", "context", "y") if name in inputs]
    *down, mid = net(picture, *given)
    outputs = {f"down_{number}": residual for number, residual in enumerate(down)}
    for scale in (1.0, 0.5):
        outputs[f"unet_scale_{scale}"] = unet(*given, control=Control((GuidedBy(net, picture, scale),)))
    return {**outputs, "mid": mid, "unet_alone": unet(*given)}


def control_net_sd(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.sd_utils import load_unet_sd

    return _control_net_of_unet(load_unet_sd, "sd", weights, inputs, config)


def control_net_sdxl(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.sdxl_utils import load_unet_sdxl

    return _control_net_of_unet(load_unet_sdxl, "sdxl", weights, inputs, config)


@torch.no_grad()
def control_net_flux(weights: Tensors, inputs: Tensors, config: dict[str, Any]) -> Tensors:
    from library.components.control_models import Control, GuidedBy
    from library.flux_utils import load_flux

    flux, net = _control_net(load_flux, "flux", "flux", weights, config)
    given = dict(inputs)
    picture = given.pop("conditioning_image")
    outputs = {f"block_{number}": residual for number, residual in enumerate(net(picture, **given))}
    for name, parts in {
        "scale_1.0": GuidedBy(net, picture), "scale_0.5": GuidedBy(net, picture, 0.5),
        "interval_1.0": GuidedBy(net, picture, repeats=False),
    }.items():  # fmt: skip
        outputs[f"flux_{name}"] = flux(**given, control=Control((parts,)))
    return {**outputs, "flux_alone": flux(**given)}


CASES: dict[str, Callable[[Tensors, Tensors, dict[str, Any]], Tensors]] = {
    "flux_dev": flux,
    "flux_schnell": flux,
    "chroma": chroma,
    "vae_ldm16": vae_ldm16,
    "sd15_unet": unet_sd,
    "sd21_unet": unet_sd,
    "sdxl_unet": unet_sdxl,
    "lllite_sdxl": lllite_sdxl,
    "vae_ldm4": vae_ldm4,
    "clip_g": clip_g,
    "clip_l": clip_l,
    "te_t5xxl": te_t5xxl,
    "sd3_medium": sd3,
    "sd35_medium": sd3,
    "sd35_large": sd3,
    "anima": anima,
    "vae_wan": vae_wan,
    "te_qwen3": te_qwen3,
    "wan_t2v": wan,
    "wan_i2v": wan,
    "te_umt5": te_umt5,
    "hunyuan_image": hunyuan_image,
    "framepack": framepack,
    "vae_hunyuan_image": vae_hunyuan_image,
    "hunyuan_video": hunyuan_video,
    "vae_hunyuan_video": vae_hunyuan_video,
    "te_llama": te_llama,
    "te_qwen25vl": te_qwen25vl,
    "lumina2": lumina2,
    "te_gemma2": te_gemma2,
    "numeric": numeric,
    "control_net_sd1": control_net_sd,
    "control_net_sdxl": control_net_sdxl,
    "control_net_flux": control_net_flux,
}

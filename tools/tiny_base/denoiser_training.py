"""Training of the tiny base's denoiser together with its two text encoders, by flow matching on ready-made latents."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.flux_models import Flux, FluxParams
from tools.tiny_base.autoencoder_training import LATENT_CHANNELS, SCALE_FACTOR, SHIFT_FACTOR
from tools.tiny_base.captions import caption_of
from tools.tiny_base.scenes import draw_scene
from tools.tiny_base.vocabulary import CLIP_LENGTH

logger = logging.getLogger(__name__)

CAPTION_VARIANTS = 4
T5_LENGTH = 32
LONG_T5_LENGTH = 96  # met now and then, so that a longer padding changes little
CAPTION_DROPOUT = 0.1
PARAMS = FluxParams(
    in_channels=4 * LATENT_CHANNELS, vec_in_dim=128, context_in_dim=128, hidden_size=192, num_heads=6, depth=3,
    depth_single_blocks=3, axes_dim=(4, 14, 14), guidance_embed=True,
)


@dataclass(frozen=True)
class DenoiserPlan:
    """Length and rates of the training."""

    steps: int = 3400
    batch_size: int = 128
    matrix_rate: float = 3e-3  # of the orthogonalised updates of the matrices inside blocks
    other_rate: float = 1.5e-3  # of AdamW for the rest
    ema_decay: float = 0.998


@dataclass(frozen=True)
class TextTokens:
    """Ids of captions: clip [N, 77], t5 [N, T]."""

    clip: Tensor
    t5: Tensor

    def rows(self, index: Tensor) -> TextTokens:
        return TextTokens(self.clip[index], self.t5[index])


class TinyBase(nn.Module):
    """Denoiser and text encoders as one module, so that one optimizer and one average hold all of them."""

    def __init__(self, num_clip_pieces: int, num_t5_pieces: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        self.clip_config: dict[str, Any] = {
            "width": 128, "heads": 2, "layers": 2, "vocab": num_clip_pieces, "act": "quick_gelu",
            "eos": num_clip_pieces - 1,
            "max_len": CLIP_LENGTH,
        }
        self.t5_config: dict[str, Any] = {
            "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4, "vocab_size": num_t5_pieces,
        }
        self.denoiser = Flux(PARAMS)
        self.clip = CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=num_clip_pieces, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH, hidden_act="quick_gelu", bos_token_id=num_clip_pieces - 2,
            eos_token_id=num_clip_pieces - 1,
            pad_token_id=num_clip_pieces - 1, projection_dim=128,
        ))
        self.t5 = T5EncoderModel(T5Config(
            **self.t5_config, feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        ))
        initialise(self.denoiser)

    def conditioning(self, tokens: TextTokens) -> tuple[Tensor, Tensor]:
        """(pooled [B, 128], T5 states [B, T, 128]). CLIP is causal, so ids after the first end token are cut off."""
        end = self.clip_config["eos"]
        ends = (tokens.clip == end).int().argmax(dim=1)  # [B]
        clip_ids = tokens.clip[:, : int(ends.max()) + 1]
        states = self.clip.text_model(input_ids=clip_ids).last_hidden_state
        return states[torch.arange(len(ends)), ends], self.t5(input_ids=tokens.t5).last_hidden_state

    def velocity(self, packed: Tensor, times: Tensor, guidance: Tensor, pooled: Tensor, text: Tensor) -> Tensor:
        """Velocity of packed latents [B, 16, 64] at times [B] in 0..1."""
        batch = len(packed)
        img_ids = position_ids(math.isqrt(packed.shape[1])).expand(batch, -1, -1)
        txt_ids = torch.zeros(batch, text.shape[1], 3)
        # Where the denoiser is compiled, it is so for the usual shape of training alone.
        run = self.denoiser if self.training and text.shape[1] == T5_LENGTH else self.denoiser.forward
        return run(packed, img_ids, text, txt_ids, times, pooled, guidance)


def initialise(denoiser: Flux) -> None:
    """Small embedders, and blocks that begin as the identity: modulation and last layer at zero."""
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight) if "_in." not in name else nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
            if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(module.weight)
    for linear in (denoiser.img_in, denoiser.txt_in):
        nn.init.xavier_uniform_(linear.weight)


def position_ids(side: int) -> Tensor:
    """(0, row, column) of side x side tokens, [1, L, 3]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(1, -1, 3).float()


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, (H/2)(W/2), 4C], channel first inside a token."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of pack for square latents."""
    side = math.isqrt(packed.shape[1])
    cells = packed.reshape(len(packed), side, side, -1, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(packed), -1, side * 2, side * 2)


def scale_latents(mean: Tensor) -> Tensor:
    return (mean - SHIFT_FACTOR) * SCALE_FACTOR


def captions_of(seed: int, count: int) -> list[str]:
    """CAPTION_VARIANTS captions of each scene, variants of a scene side by side, and the empty caption last."""
    return [
        caption_of(draw_scene(seed, i), seed, i, variant) for i in range(count) for variant in range(CAPTION_VARIANTS)
    ] + [""]


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Half uniform, half logit-normal in 0..1: the ends of the range matter, the middle most."""
    uniform = torch.rand(count, generator=generator)
    bell = torch.sigmoid(torch.randn(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < 0.5, uniform, bell)


def make_optimizers(model: TinyBase, plan: DenoiserPlan) -> list[torch.optim.Optimizer]:
    """Orthogonalised momentum for the matrices inside blocks, AdamW for embeddings, modulation, biases and the ends."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = any(part in name for part in ("_blocks.", ".layers.", ".block."))
        special = any(part in name for part in ("mod.lin", "modulation.lin", "relative_attention_bias"))
        (matrices if parameter.ndim == 2 and inside and not special else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    averaged = list(average.parameters())
    torch._foreach_lerp_(averaged, list(model.parameters()), 1 - decay)


def choose_tokens(tokens: TextTokens, scenes: Tensor, generator: torch.Generator) -> TextTokens:
    """One caption for each scene: a random variant, or the empty one (the last row)."""
    variant = torch.randint(CAPTION_VARIANTS, (len(scenes),), generator=generator)
    dropped = torch.rand(len(scenes), generator=generator) < CAPTION_DROPOUT
    return tokens.rows(torch.where(dropped, torch.tensor(len(tokens.t5) - 1), scenes * CAPTION_VARIANTS + variant))


def flow_loss(model: TinyBase, latents: Tensor, tokens: TextTokens, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at drawn times; latents packed and scaled. The guidance input is drawn and
    means nothing, so that any --guidance_scale gives the same picture."""
    times = draw_times(len(latents), generator)
    noise = torch.randn(latents.shape, generator=generator)
    guidance = torch.empty(len(latents)).uniform_(1.0, 5.0, generator=generator)
    share = times[:, None, None]
    # The plain form of attention: on a CPU its gradient is several times quicker than the fused one's for short
    # sequences.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        pooled, text = model.conditioning(tokens)
        prediction = model.velocity((1 - share) * latents + share * noise, times, guidance, pooled, text)
    return (prediction.float() - (noise - latents)).square().mean()


def rate_share(step: int, steps: int) -> float:
    """100 steps up, level, then down to zero over the last 40 %."""
    return min((step + 1) / 100, 1.0, max(0.01, (steps - step) / (0.4 * steps)))


def lengthened(tokens: TextTokens) -> TextTokens:
    """The same captions with more T5 padding."""
    return replace(tokens, t5=nn.functional.pad(tokens.t5, (0, LONG_T5_LENGTH - tokens.t5.shape[1])))


def train_denoiser(
    model: TinyBase, latents: Tensor, tokens: TextTokens, plan: DenoiserPlan, seed: int,
    report: Callable[[int, TinyBase], None]
) -> TinyBase:
    """Train on packed, scaled latents [N, 16, 64] and the tokens of captions_of(); returns the averaged model.

    `report(step, averaged model)` is called every 500 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, plan)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started, shown = time.monotonic(), 1.0
    model.train()
    for step in range(plan.steps):
        is_long = step % 20 == 19
        scenes = torch.randint(len(latents), (plan.batch_size // (3 if is_long else 1),), generator=generator)
        chosen = choose_tokens(tokens, scenes, generator)
        loss = flow_loss(model, latents[scenes], lengthened(chosen) if is_long else chosen, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, base_rates):
            optimizer.param_groups[0]["lr"] = rate * rate_share(step, plan.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, model, min(plan.ema_decay, (step + 1) / (step + 10)))
        shown = 0.98 * shown + 0.02 * loss.item()
        if step % 100 == 0:
            logger.info("denoiser step %d/%d loss %.4f, %.0f s", step, plan.steps, shown, time.monotonic() - started)
        if step % 500 == 499:
            report(step + 1, average)
    return average


@torch.no_grad()
def generate(
    model: TinyBase, tokens: TextTokens, empty: TextTokens, seeds: Sequence[int], steps: int = 20,
    cfg_scale: float = 3.0
) -> Tensor:
    """Latents [B, 16, 8, 8] as the autoencoder's decoder takes them; one seed for each row of tokens."""
    count = len(seeds)
    noise = torch.stack(
        [torch.randn(16, PARAMS.in_channels, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    shift = math.exp(0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256))
    even = torch.linspace(1, 0, steps + 1)
    sigmas = shift * even / (1 + (shift - 1) * even)
    with_text, without = model.conditioning(tokens), model.conditioning(empty)
    both = [torch.cat((first, second.expand_as(first))) for first, second in zip(with_text, without)]
    state, guidance = noise, torch.full((2 * count,), 1.0)
    for now, following in zip(sigmas, sigmas[1:]):
        velocity = model.velocity(state.repeat(2, 1, 1), now.expand(2 * count), guidance, *both)
        conditional, unconditional = velocity.chunk(2)
        state = state + (following - now) * (unconditional + cfg_scale * (conditional - unconditional))
    return unpack(state) / SCALE_FACTOR + SHIFT_FACTOR

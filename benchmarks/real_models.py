"""Models of real size with random weights, to measure training on a GPU: the denoiser as it is, beside it text encoders
and an autoencoder of a layer or two whose outputs have the real widths. Their caches are filled by the ordinary ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.model_files import shapes_of, write_random
from library.tiny_models.pictures import draw_pictures, write_configuration
from library.tiny_models.weights import clip_state, save_part, t5_state

CLIPS = """
[[datasets]]
resolution = {size}
batch_size = 1
video_jsonl_file = {path}
target_frames = [{frames}]
frame_extraction = "head"
cache_directory = {caches}
"""
PICTURES = 4


@dataclass(frozen=True)
class Widths:
    """Sizes of one denoiser as its parameters name them, and of the pictures or clips that it learns."""

    denoiser: dict[str, object]
    width: int
    height: int
    frames: int = 1
    pooled: int = 0
    """width of the second text encoder, where there is one"""


@dataclass(frozen=True)
class RealModel:
    """`real`, `small`: the model, and one that takes the same way through the code in moments on a CPU. `build` writes
    its files into a folder and gives the words of the command line that name them."""

    title: str
    family: str
    network_module: str
    real: Widths
    small: Widths
    build: Callable[[Path, Widths], list[str]]
    options: tuple[str, ...] = ()
    small_options: tuple[str, ...] = ()

    def name(self, is_small: bool) -> str:
        """What the figures are of."""
        widths = self.small if is_small else self.real
        frames = f", {widths.frames} frames" if widths.frames > 1 else ""
        return f"{'small ' if is_small else ''}{self.title}, {widths.width}x{widths.height}{frames}"

    def write(self, folder: Path, is_small: bool) -> list[str]:
        """Model and data; the words of the command line that name them."""
        widths = self.small if is_small else self.real
        folder.mkdir(parents=True, exist_ok=True)
        options = [*self.options, *(self.small_options if is_small else ())]
        return [*self.build(folder, widths), *options, f"--dataset_config={write_data(folder, widths)}"]


def write_data(folder: Path, widths: Widths) -> Path:
    """Pictures, scaled up to the size that is measured, or one clip of them."""
    path, images = folder / "data.toml", draw_pictures(folder / "images", max(PICTURES, widths.frames))
    if widths.frames == 1:
        return write_configuration(path, images, [widths.width, widths.height], batch_size=1)
    clip = json.dumps({"video_path": images.as_posix(), "caption": "a circle, many times"})
    (folder / "clips.jsonl").write_text(f"{clip}\n", encoding="utf-8")
    where = json.dumps((folder / "clips.jsonl").as_posix())
    caches = json.dumps((folder / "caches").as_posix())
    text = CLIPS.format(size=[widths.width, widths.height], path=where, frames=widths.frames, caches=caches)
    path.write_text(text, encoding="utf-8")
    return path


def build_flux(folder: Path, widths: Widths) -> list[str]:
    from dataclasses import asdict

    from library.flux_models import Flux, FluxParams
    from library.tiny_models.flux_tiny import build_tiny_flux
    from library.tiny_models.vocabularies import T5_ROWS, sentencepiece_model

    tiny, params = build_tiny_flux(folder), FluxParams(**widths.denoiser)
    generator = torch.Generator().manual_seed(0)
    write_random(tiny.flux, shapes_of(lambda: Flux(params)), config=asdict(params))
    vocabulary = len(json.loads((tiny.clip_l_tokenizer / "vocab.json").read_text(encoding="utf-8")))
    clip_l = clip_state(generator, width=params.vec_in_dim, layers=1, vocab=vocabulary)
    save_part(clip_l, tiny.clip_l, {"heads": 2, "act": "quick_gelu", "eos": vocabulary - 1}, torch.float32)
    t5 = t5_state(generator, d_model=params.context_in_dim, d_kv=8, heads=2, d_ff=64, layers=1, vocab=T5_ROWS)
    t5["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_part(t5, tiny.t5xxl, {}, torch.float32)
    return tiny.arguments()


def build_sdxl(folder: Path, widths: Widths) -> list[str]:
    from library.components.unet_models import UNetParams
    from library.safetensors_utils import load_safetensors, read_header
    from library.sdxl_models import SdxlUNet2DConditionModel
    from library.tiny_models import sdxl_tiny
    from library.tiny_models.unet_tiny import open_clip_state

    tiny, params = sdxl_tiny.build_tiny_sdxl(folder), UNetParams(**widths.denoiser)
    shapes = shapes_of(lambda: SdxlUNet2DConditionModel(params), "model.diffusion_model.")
    kept = {key: t for key, t in load_safetensors(tiny.model).items() if key.startswith("first_stage_model.")}
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(json.loads((tiny.tokenizer / "vocab.json").read_text(encoding="utf-8")))
    first = clip_state(generator, width=params.context_dim - widths.pooled, layers=2, vocab=vocabulary)
    kept |= {f"conditioner.embedders.0.transformer.{key}": t for key, t in first.items()}
    large = open_clip_state(generator, width=widths.pooled, layers=3, vocab=vocabulary)
    kept |= {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in large.items()}
    config = json.loads(read_header(tiny.model)[1]["model_config"])
    write_random(
        tiny.model, shapes, beside=kept, config={**config, "heads": params.heads, "norm_groups": params.norm_groups}
    )
    return tiny.arguments()


def build_wan(folder: Path, widths: Widths) -> list[str]:
    from library.tiny_models import wan_tiny
    from library.tiny_models.vocabularies import T5_ROWS
    from library.tiny_models.weights import random_weight
    from library.wan_models import WanModel, WanParams

    tiny, params = wan_tiny.build_tiny_wan(folder), WanParams(**widths.denoiser)
    shapes_lack = {"num_heads": params.num_heads, "text_len": params.text_len}
    write_random(tiny.denoiser, shapes_of(lambda: WanModel(params)), config=shapes_lack)
    generator = torch.Generator().manual_seed(0)
    t5 = t5_state(generator, d_model=params.text_dim, d_kv=8, heads=2, d_ff=64, layers=2, vocab=T5_ROWS)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"  # umT5 has one in every block
    t5[bias.format(1)] = random_weight(bias.format(1), tuple(t5[bias.format(0)].shape), generator)
    save_part(t5, tiny.t5, {}, torch.float32)
    return tiny.arguments()


MODELS = {
    "flux": RealModel(
        title="FLUX.1 dev", family="flux", network_module="networks.lora_flux", build=build_flux,
        options=("--guidance_scale=1",), small_options=("--t5xxl_max_token_length=32",),
        real=Widths({}, 1024, 1024),
        small=Widths(
            {
                "vec_in_dim": 48, "context_in_dim": 40, "hidden_size": 64, "num_heads": 2, "depth": 3,
                "depth_single_blocks": 6, "axes_dim": (8, 12, 12),
            },
            64, 64,
        ),
    ),
    "sdxl": RealModel(
        title="SDXL", family="sdxl", network_module="networks.lora", build=build_sdxl,
        real=Widths(
            {
                "channels": (320, 640, 1280), "attention_levels": (False, True, True), "transformer_depth": (0, 2, 10),
                "middle_depth": 10, "heads": (5, 10, 20), "context_dim": 2048, "use_linear_projection": True,
                "adm_in_channels": 2816,
            },
            1024, 1024, pooled=1280,
        ),
        small=Widths(
            {
                "channels": (16, 16, 32), "attention_levels": (False, True, True), "transformer_depth": (0, 1, 1),
                "middle_depth": 1, "heads": (2, 2, 4), "context_dim": 48, "use_linear_projection": True,
                "adm_in_channels": 32 + 6 * 8, "time_embed_dim": 32, "norm_groups": 4, "num_res_blocks": 1,
            },
            64, 64, pooled=32,
        ),
    ),
    "wan": RealModel(
        title="Wan 2.1 1.3B", family="wan", network_module="networks.lora_wan", build=build_wan,
        options=("--task=t2v-1.3B",),
        real=Widths({"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 832, 480, 81),
        small=Widths(
            {
                "dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 2, "text_dim": 24, "freq_dim": 32,
                "text_len": 64,
            },
            64, 64, 5,
        ),
    ),
}  # fmt: skip

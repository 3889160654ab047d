"""A complete FLUX.1 checkpoint set with random weights: denoiser, autoencoder, CLIP-L, T5 and their tokenizers.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments. It goes through the loaders
of real checkpoints; what its shapes do not tell stands in the files' `model_config` metadata.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library.flux_models import AutoEncoder, AutoEncoderParams, Flux, FluxParams
from library.safetensors_utils import save_file_atomic

CLIP_WORDS = ("a", "the", "of", "red", "blue", "green", "cat", "dog", "photo", "circle", "square", "girl")
T5_ROWS = 160


@dataclass(frozen=True)
class TinyFlux:
    """Paths of the set. `t5xxl` carries its tokenizer as `spiece_model`; `t5xxl_tokenizer` is the same as a folder."""

    folder: Path
    flux: Path
    ae: Path
    clip_l: Path
    t5xxl: Path
    clip_l_tokenizer: Path
    t5xxl_tokenizer: Path
    params: FluxParams
    ae_params: AutoEncoderParams

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        return [
            f"--pretrained_model_name_or_path={self.flux}", f"--ae={self.ae}", f"--clip_l={self.clip_l}",
            f"--t5xxl={self.t5xxl}", f"--clip_l_tokenizer={self.clip_l_tokenizer}",
        ]  # fmt: skip


def build_tiny_flux(
    folder: str | Path,
    *,
    guidance: bool = True,
    seed: int = 0,
    hidden: int = 32,
    depth: int = 1,
    depth_single_blocks: int = 2,
    dtype: torch.dtype = torch.float32,
) -> TinyFlux:
    """Write the set into `folder` (made when missing) and return its paths. `hidden` is a multiple of 32 (2 heads)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    head_dim = hidden // 2
    params = FluxParams(
        in_channels=64, vec_in_dim=32, context_in_dim=24, hidden_size=hidden, mlp_ratio=2.0, num_heads=2, depth=depth,
        depth_single_blocks=depth_single_blocks, axes_dim=(head_dim - 12, 6, 6), guidance_embed=guidance,
    )  # fmt: skip
    ae_params = AutoEncoderParams(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4)
    tiny = TinyFlux(
        folder=folder,
        flux=folder / "flux1.safetensors",
        ae=folder / "ae.safetensors",
        clip_l=folder / "clip_l.safetensors",
        t5xxl=folder / "t5xxl.safetensors",
        clip_l_tokenizer=folder / "clip_l_tokenizer",
        t5xxl_tokenizer=folder / "t5xxl_tokenizer",
        params=params,
        ae_params=ae_params,
    )
    save_part(random_state(Flux(params), generator), tiny.flux, asdict(params), dtype)
    save_part(random_state(AutoEncoder(ae_params), generator), tiny.ae, asdict(ae_params), dtype)
    vocab_size = write_clip_tokenizer(tiny.clip_l_tokenizer)
    clip_l = clip_state(generator, width=32, layers=2, vocab=vocab_size)
    save_part(clip_l, tiny.clip_l, {"heads": 2, "act": "quick_gelu", "eos": vocab_size - 1}, dtype)
    blob = sentencepiece_model()
    tiny.t5xxl_tokenizer.mkdir(exist_ok=True)
    (tiny.t5xxl_tokenizer / "spiece.model").write_bytes(blob)
    t5xxl = t5_state(generator, d_model=24, d_kv=8, heads=2, d_ff=40, layers=2, vocab=T5_ROWS)
    t5xxl["spiece_model"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    save_part(t5xxl, tiny.t5xxl, {}, dtype)
    return tiny


def save_part(state: dict[str, Tensor], path: Path, config: dict, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    save_file_atomic(tensors, path, {"model_config": json.dumps(config, sort_keys=True)} if config else None)


def random_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Non-zero weights of a sensible size for every key of a module."""
    return {key: random_weight(key, tensor.shape, generator) for key, tensor in model.state_dict().items()}


def random_weight(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Matrices keep the variance of their input; scales are near 1, biases near 0."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / torch.Size(shape[1:]).numel() ** 0.5
    is_scale = key.endswith((".scale", "norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight"))
    return 1 + 0.1 * values if is_scale else 0.05 * values


def clip_state(generator: torch.Generator, *, width: int, layers: int, vocab: int, max_len: int = 77) -> dict[str, Tensor]:
    """Weights of a CLIP-L text encoder in the layout of its single file."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": (vocab, width),
        "text_model.embeddings.position_embedding.weight": (max_len, width),
    }
    for number in range(layers):
        place = f"text_model.encoder.layers.{number}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= {f"{place}self_attn.{name}.weight": (width, width), f"{place}self_attn.{name}.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{place}{name}.weight": (width,), f"{place}{name}.bias": (width,)}
        shapes |= {f"{place}mlp.fc1.weight": (4 * width, width), f"{place}mlp.fc1.bias": (4 * width,)}
        shapes |= {f"{place}mlp.fc2.weight": (width, 4 * width), f"{place}mlp.fc2.bias": (width,)}
    shapes |= {"text_model.final_layer_norm.weight": (width,), "text_model.final_layer_norm.bias": (width,)}
    return {key: random_weight(key, shape, generator) for key, shape in shapes.items()}


def t5_state(
    generator: torch.Generator, *, d_model: int, d_kv: int, heads: int, d_ff: int, layers: int, vocab: int, buckets: int = 32
) -> dict[str, Tensor]:
    """Weights of a T5 v1.1 encoder in the layout of its single file."""
    inner = d_kv * heads
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (vocab, d_model)}
    for number in range(layers):
        place = f"encoder.block.{number}.layer."
        for name in "qkv":
            shapes[f"{place}0.SelfAttention.{name}.weight"] = (inner, d_model)
        shapes[f"{place}0.SelfAttention.o.weight"] = (d_model, inner)
        if number == 0:
            shapes[f"{place}0.SelfAttention.relative_attention_bias.weight"] = (buckets, heads)
        shapes[f"{place}0.layer_norm.weight"] = (d_model,)
        shapes[f"{place}1.DenseReluDense.wi_0.weight"] = (d_ff, d_model)
        shapes[f"{place}1.DenseReluDense.wi_1.weight"] = (d_ff, d_model)
        shapes[f"{place}1.DenseReluDense.wo.weight"] = (d_model, d_ff)
        shapes[f"{place}1.layer_norm.weight"] = (d_model,)
    shapes["encoder.final_layer_norm.weight"] = (d_model,)
    return {key: random_weight(key, shape, generator) for key, shape in shapes.items()}


def write_clip_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt over all bytes, with a few whole words; returns the number of entries (the last is EOS)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    merges = list(dict.fromkeys(pair for word in CLIP_WORDS for pair in _merges_of(word)))
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    vocabulary = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]), encoding="utf-8")
    return len(vocabulary)


def _merges_of(word: str) -> list[tuple[str, str]]:
    """Merges that build a word from left to right."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    return [("".join(pieces[:count]), pieces[count]) for count in range(1, len(pieces))]


def sentencepiece_model() -> bytes:
    """A unigram model of single characters and a few words, as the bytes of a sentencepiece file."""
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-_<>/"
    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    pieces += [(character, -6.0, 1) for character in characters]
    pieces += [("▁" + word, -4.0 - number / 16, 1) for number, word in enumerate(CLIP_WORDS)]
    return b"".join(_protobuf_bytes(1, _piece(*piece)) for piece in pieces)


def _piece(text: str, score: float, kind: int) -> bytes:
    return _protobuf_bytes(1, text.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])


def _protobuf_bytes(number: int, value: bytes) -> bytes:
    assert len(value) < 128, "lengths of one byte are enough here"
    return bytes([number << 3 | 2, len(value)]) + value

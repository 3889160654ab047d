"""Denoiser of Wan against the class of diffusers, and its encoders against those of transformers, whose random weights
they are given."""

from __future__ import annotations

import pytest
import torch

from library.checkpoints import layout_rules
from library.checkpoints.wan_convert import denoiser_rules
from library.safetensors_utils import save_file_atomic
from library.wan_clip_utils import MEAN, STD, load_vision, vision_states
from library.wan_models import WanModel, WanParams
from library.wan_utils import denoiser_state

diffusers = pytest.importorskip("diffusers")
HEADS, HEAD, TEXT, VISION, PICTURE_TOKENS = 2, 24, 20, 16, 5


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def seeded(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(in_dim: int, *, vision: bool = False, positions: int = 0, layers: int = 2):
    """(denoiser of diffusers with random weights, ours with the same)."""
    torch.manual_seed(3)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=in_dim, out_channels=4, text_dim=TEXT,
        freq_dim=32, ffn_dim=40, num_layers=layers, image_dim=VISION if vision else None,
        added_kv_proj_dim=HEADS * HEAD if vision else None, pos_embed_seq_len=positions or None,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    ours = WanModel(
        WanParams(
            dim=HEADS * HEAD, ffn_dim=40, num_heads=HEADS, num_layers=layers, in_dim=in_dim, out_dim=4, text_dim=TEXT,
            freq_dim=32, img_dim=VISION if vision else None, img_positions=positions,
        )
    ).eval()
    state = theirs.state_dict()
    ours.load_state_dict(denoiser_state(state))
    again = layout_rules.from_original(ours.state_dict(), denoiser_rules(ours.state_dict()))
    assert again.keys() == state.keys() and all(torch.equal(again[key], tensor) for key, tensor in state.items())
    return theirs, ours


@pytest.mark.parametrize("name", ["text", "pictures", "first and last", "per frame"])
@torch.no_grad()
def test_denoiser(name: str) -> None:
    """Text behind which zeros follow, tokens of one picture or of two with positions, a time for each token."""
    vision, positions = name in ("pictures", "first and last"), 2 * PICTURE_TOKENS if name == "first and last" else 0
    theirs, ours = both(12 if vision else 4, vision=vision, positions=positions)
    x, text = seeded(2, 4, 3, 4, 6), torch.cat((seeded(2, 7, TEXT), torch.zeros(2, 505, TEXT)), dim=1)
    y = seeded(2, 8, 3, 4, 6, seed=6) if vision else None
    states = seeded(2, PICTURE_TOKENS * (2 if positions else 1), VISION, seed=7) if vision else None
    times = torch.tensor([130.5, 999.0])
    per_token = torch.tensor([[0.0, 612.5, 3.0], [0.0, 130.5, 999.0]]).repeat_interleave(6, dim=1)
    chosen = per_token if name == "per frame" else times
    # diffusers wants both pictures as rows of a batch
    given = states.reshape(-1, PICTURE_TOKENS, VISION) if states is not None and positions else states
    expected = theirs(
        torch.cat((x, y), dim=1) if vision else x, chosen, text, encoder_hidden_states_image=given, return_dict=False
    )[0]
    result = ours(x, chosen, text[:, :9], y=y, clip_fea=states)
    assert relative(result, expected) < 1e-5
    if name == "per frame":
        assert torch.equal(result, ours(x, chosen[:, ::6], text[:, :7])), "one per frame is that of its tokens"


@torch.no_grad()
def test_vision_encoder(tmp_path) -> None:
    """The states before the last layer, from a file in either layout, of pictures that are stretched and normalised."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14,
        hidden_act="gelu",
    )  # fmt: skip
    theirs = CLIPVisionModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {key.removeprefix("vision_model."): value for key, value in theirs.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    save_file_atomic({f"vision_model.{key}": value for key, value in state.items()}, tmp_path / "hf.safetensors")
    save_file_atomic(own_layout(state), tmp_path / "own.safetensors")
    pictures = seeded(2, 3, 40, 24).clamp(-1, 1)
    resized = torch.nn.functional.interpolate(pictures, size=(28, 28), mode="bicubic")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = ((resized + 1) / 2 - mean) / std
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    for name in ("hf", "own"):
        ours = load_vision(tmp_path / f"{name}.safetensors", torch.float32, "cpu", config={"heads": 2})
        assert relative(vision_states(ours, pictures), expected) < 1e-5, name


def own_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as in the released file, written out by hand."""
    own = {
        "visual.cls_embedding": state["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": state["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
        "visual.head": torch.zeros(32, 20),
        "textual.token_embedding.weight": torch.zeros(4, 4),
    }
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.0"}
    for kind in ("weight", "bias"):
        own[f"visual.pre_norm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        own[f"visual.post_norm.{kind}"] = state[f"post_layernorm.{kind}"]
        for layer in range(3):
            theirs, ours = f"encoder.layers.{layer}.", f"visual.transformer.{layer}."
            for name, mine in {**names, "mlp.fc2": "mlp.2"}.items():
                own[f"{ours}{mine}.{kind}"] = state[f"{theirs}{name}.{kind}"]
            own[f"{ours}attn.to_qkv.{kind}"] = torch.cat([state[f"{theirs}self_attn.{n}_proj.{kind}"] for n in "qkv"])
    return own


@torch.no_grad()
def test_text_encoder(tmp_path) -> None:
    """A folder as diffusers writes it, its embedding under both of its names."""
    from transformers import UMT5Config, UMT5EncoderModel

    from library.wan_text_encoder_utils import load_umt5

    torch.manual_seed(2)
    config = UMT5Config(
        vocab_size=40, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    theirs = UMT5EncoderModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "text_encoder")
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    ours = load_umt5(tmp_path, torch.float32, "cpu")
    expected, result = (model(ids, mask).last_hidden_state[mask.bool()] for model in (theirs, ours))
    assert relative(result, expected) < 1e-6
    state = {key: value.clone() for key, value in theirs.state_dict().items() if key != "shared.weight"}
    save_file_atomic(state, tmp_path / "one.safetensors")  # under its other name alone
    again = load_umt5(tmp_path / "one.safetensors", torch.float32, "cpu")
    assert torch.equal(again(ids, mask).last_hidden_state[mask.bool()], result)

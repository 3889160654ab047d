"""Our LoRA files of Stable Diffusion 1, 2 and SDXL in diffusers: trained on a folder that diffusers wrote, read back by
it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library import sd_utils, sdxl_utils
from library.components.text_encoder_utils import CLIP_G, CLIP_H, CLIP_L, load_clip
from library.sdxl_train_utils import predict_noise
from library.training import cli
from networks.files.lora_conversion import to_diffusers
from networks.lora import create_network_from_weights
from tests.runs.conftest import draw_pictures
from tests.third_parties import need_agreement
from tests.tiny import write_clip_tokenizer

diffusers = pytest.importorskip("diffusers")

KINDS = ("sd1", "sd2", "sdxl")
LAYERS = 2
DATASET = "[[datasets]]\nresolution = 64\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = '{images}'\ncaption_extension = '.txt'\n"


@dataclass
class Trained:
    """A folder in the layout of diffusers and a LoRA that the command line trained on it."""

    kind: str
    folder: Path
    file: Path

    @property
    def family(self) -> str:
        return "sdxl" if self.kind == "sdxl" else "sd"


def write_folder(kind: str, folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(3)
    common = {"block_out_channels": (16, 32, 32), "layers_per_block": LAYERS, "norm_num_groups": 8, "sample_size": 8}
    plain, cross, up, cross_up = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
    if kind == "sdxl":
        common |= {
            "down_block_types": (plain, cross, cross), "up_block_types": (cross_up, cross_up, up),
            "cross_attention_dim": 48,
            "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (2, 4, 4), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 48,
        }  # fmt: skip
    else:
        common |= {
            "down_block_types": (cross, cross, plain), "up_block_types": (up, cross_up, cross_up),
            "attention_head_dim": 4,
            "cross_attention_dim": 32, "use_linear_projection": kind == "sd2",
        }  # fmt: skip
    diffusers.UNet2DConditionModel(**common).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")  # fmt: skip
    vocab = write_clip_tokenizer(folder / "tokenizer")
    text = {
        "vocab_size": vocab, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1, "pad_token_id": vocab - 1,
    }  # fmt: skip
    width = 16 if kind == "sdxl" else 32
    act = "gelu" if kind == "sd2" else "quick_gelu"
    first = CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, hidden_act=act, **text)
    CLIPTextModel(first).save_pretrained(folder / "text_encoder")
    if kind == "sdxl":
        second = CLIPTextConfig(hidden_size=32, intermediate_size=64, hidden_act="gelu", projection_dim=32, **text)
        CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory) -> Trained:
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    write_folder(kind, root / "model")
    (root / "data.toml").write_text(DATASET.format(images=draw_pictures(root / "images", 3)), encoding="utf-8")
    result = Trained(kind, root / "model", root / "out" / "lora.safetensors")
    cli.run(result.family, "network", [
        f"--pretrained_model_name_or_path={root / 'model'}", f"--clip_tokenizer={root / 'model' / 'tokenizer'}",
        f"--dataset_config={root / 'data.toml'}", f"--output_dir={root / 'out'}", "--output_name=lora",
        "--network_module=networks.lora", "--network_dim=4", "--network_alpha=2", "--network_args", "conv_dim=2",
        "conv_alpha=1",
        "--max_train_steps=3", "--learning_rate=0.1", "--seed=5", "--max_data_loader_n_workers=0",
        "--console_log_level=WARNING", *(["--v2"] if kind == "sd2" else []),
    ])  # fmt: skip
    return result


def our_models(trained: Trained):
    """(U-Net, text encoders) of the folder."""
    if trained.kind == "sdxl":
        unet, slots = sdxl_utils.load_unet_sdxl(trained.folder, torch.float32, "cpu"), (CLIP_L, CLIP_G)
    else:
        unet = sd_utils.load_unet_sd(trained.folder, torch.float32, "cpu")
        slots = (CLIP_H if trained.kind == "sd2" else CLIP_L,)
    return unet, [load_clip(trained.folder, slot, torch.float32, "cpu") for slot in slots]


def pipeline_of(trained: Trained):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = diffusers.UNet2DConditionModel.from_pretrained(trained.folder / "unet").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(trained.folder / "vae")
    parts = {
        "vae": vae, "unet": unet, "scheduler": diffusers.DDIMScheduler(), "tokenizer": None,
        "text_encoder": CLIPTextModel.from_pretrained(trained.folder / "text_encoder").eval(),
    }  # fmt: skip
    if trained.kind == "sdxl":
        second = CLIPTextModelWithProjection.from_pretrained(trained.folder / "text_encoder_2").eval()
        return diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=None, add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def predictions(kind: str, ours, theirs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ours, theirs) for the same inputs: the U-Net, then each text encoder. Each is a (U-Net, encoders) pair."""
    generator = torch.Generator().manual_seed(1)
    latents, times = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([1, 940])
    states = torch.randn(2, 5, 48 if kind == "sdxl" else 32, generator=generator)
    pooled, sizes = (
        torch.randn(2, 32, generator=generator),
        torch.tensor([[80.0, 64, 0, 8, 64, 64], [64, 64, 0, 0, 64, 64]]),
    )
    ids = torch.randint(0, 100, (2, 77), generator=generator)
    with torch.no_grad():
        if kind == "sdxl":
            parts = {"hidden_state1": states[..., :16], "hidden_state2": states[..., 16:], "pool2": pooled}
            mine = predict_noise(ours[0], latents, times, parts, (sizes[:, :2], sizes[:, 2:4], sizes[:, 4:]))
            other = theirs[0](
                latents, times, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
            ).sample
        else:
            mine, other = ours[0](latents, times, states), theirs[0](latents, times, states).sample
        pairs = [(mine, other)]
        for own, foreign in zip(ours[1], theirs[1], strict=True):
            pairs.append(tuple(encoder(ids, output_hidden_states=True).hidden_states[-1] for encoder in (own, foreign)))
    return pairs


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_trained_file_changes_the_output_as_our_own_forward(trained: Trained, layout: str, tmp_path: Path) -> None:
    unet, encoders = our_models(trained)
    pipeline = pipeline_of(trained)
    theirs = (pipeline.unet, [e for e in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if e is not None])
    plain = predictions(trained.kind, (unet, encoders), theirs)
    for mine, other in plain:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    network, tensors = create_network_from_weights(1.0, str(trained.file), None, encoders, unet, for_inference=True)
    network.apply_to(encoders, unet)
    assert network.load_weights(str(trained.file)) == {"missing": [], "unexpected": []}
    tensors = load_file(trained.file)
    pipeline.load_lora_weights(tensors if layout == "kohya" else to_diffusers(trained.family, tensors))
    for (mine, other), (before, _) in zip(predictions(trained.kind, (unet, encoders), theirs), plain, strict=True):
        assert (mine - before).norm() / before.norm() > 0.01
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    loaded = sum("lora_A" in name for model in (theirs[0], *theirs[1]) for name, _ in model.named_parameters())
    assert loaded == sum(key.endswith("lora_down.weight") for key in tensors)


@pytest.mark.parametrize("to", ["diffusers", "peft", "folder"])
def test_a_converted_file_acts_the_same_in_diffusers_and_peft(trained: Trained, to: str, tmp_path: Path) -> None:
    """Strength folded in; strength in the metadata, which diffusers reads from the file; a folder for PEFT alone."""
    from tools.convert_lora import main

    unet, encoders = our_models(trained)
    pipeline = pipeline_of(trained)
    theirs = [
        pipeline.unet,
        [e for e in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if e is not None],
    ]
    plain, _ = predictions(trained.kind, (unet, encoders), theirs)[0]
    network, _ = create_network_from_weights(1.0, str(trained.file), None, encoders, unet, for_inference=True)
    network.apply_to(encoders, unet)
    network.load_weights(str(trained.file))
    source, target = trained.file, tmp_path / "converted.safetensors"
    if to == "folder":  # holds one model
        from peft import PeftModel
        from safetensors.torch import save_file

        source, target = tmp_path / "unet.safetensors", tmp_path / "folder" / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(trained.file).items() if "_te" not in key[:8]}, source)
    words = [str(source), str(target), "--to", "peft" if to == "folder" else to, "--family", trained.family]
    assert main(words) == 0
    if to == "folder":
        theirs[0] = PeftModel.from_pretrained(pipeline.unet, target.parent)
        theirs[1] = encoders
    else:
        pipeline.load_lora_weights(tmp_path, weight_name=target.name)
    results = predictions(trained.kind, (unet, encoders), theirs)
    assert (results[0][0] - plain).norm() / plain.norm() > 0.01
    for mine, other in results:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_a_file_that_diffusers_saved_acts_the_same_here(trained: Trained, tmp_path: Path) -> None:
    """Its strength stands in the metadata alone; alpha is three times the rank."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    need_agreement("transformers", "peft")  # the encoders take adapters of peft
    torch.manual_seed(7)
    pipeline = pipeline_of(trained)
    theirs = (
        pipeline.unet,
        [e for e in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if e is not None],
    )
    ours = our_models(trained)
    plain = predictions(trained.kind, ours, theirs)
    pipeline.unet.add_adapter(LoraConfig(
        r=2, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2"],
        alpha_pattern={"conv1": 3},
    ))  # fmt: skip
    parts = {"unet": pipeline.unet}
    for number, encoder in enumerate(theirs[1]):
        encoder.add_adapter(
            LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, use_rslora=True, target_modules=["q_proj", "fc1"])
        )
        parts["text_encoder" if number == 0 else "text_encoder_2"] = encoder
    pipeline.save_lora_weights(
        tmp_path, **{f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in parts.items()},
        **_collate_lora_metadata(parts),
    )  # fmt: skip
    path = str(tmp_path / "pytorch_lora_weights.safetensors")
    network, _ = create_network_from_weights(1.0, path, None, ours[1], ours[0], for_inference=True)
    network.apply_to(ours[1], ours[0])
    assert network.load_weights(path) == {"missing": [], "unexpected": []}
    for (mine, other), (before, _) in zip(predictions(trained.kind, ours, theirs), plain, strict=True):
        assert (mine - before).norm() / before.norm() > 0.01
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

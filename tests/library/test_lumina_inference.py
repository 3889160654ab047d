"""The image script of Lumina-Image 2.0 through its command line, and its guidance."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.checkpoints.lumina_convert import to_diffusers
from library.core.errors import ConfigError
from library.generation import lumina_inference
from library.generation.lumina_options import LuminaRequest
from library.generation.lumina_pipeline import LuminaPipeline
from library.generation.sampling_utils import start_noise
from library.lumina_utils import LAYOUTS, load_lumina
from library.safetensors_utils import save_file_atomic
from library.tiny_models.lumina_tiny import TinyLumina, build_tiny_lumina
from tests.library.generation.made_again import check_made_again, lines_file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyLumina:
    return build_tiny_lumina(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(tiny: TinyLumina) -> Path:
    """A LoRA with weights that show, in denoiser and text encoder."""
    generator, tensors = torch.Generator().manual_seed(4), {}
    layers = (
        ("unet_layers_0_attention_qkv", 48, 96), ("unet_final_layer_linear", 48, 64),
        ("te_layers_0_mlp_up_proj", 24, 40),
    )  # fmt: skip
    for name, size_in, size_out in layers:
        tensors[f"lora_{name}.lora_down.weight"] = torch.randn(4, size_in, generator=generator)
        tensors[f"lora_{name}.lora_up.weight"] = torch.randn(size_out, 4, generator=generator)
        tensors[f"lora_{name}.alpha"] = torch.tensor(4.0)
    save_file_atomic(tensors, tiny.folder / "adapter.safetensors")
    return tiny.folder / "adapter.safetensors"


def arguments(tiny: TinyLumina, folder: Path, *more: str) -> list[str]:
    own = [] if tiny.ae == tiny.lumina else [f"--gemma2_path={tiny.gemma2}", f"--ae_path={tiny.ae}"]
    return [
        f"--pretrained_model_name_or_path={tiny.lumina}", *own, "--gemma2_max_token_length=16", "--dtype=fp32",
        "--gemma2_dtype=fp32", "--ae_dtype=fp32", "--image_width=64", "--image_height=32", "--steps=4",
        f"--output_dir={folder}", *(more if any("--seed" in word for word in more) else ("--seed=5", *more)),
    ]  # fmt: skip


def pixels_of(paths: list[Path]) -> list[bytes]:
    return [Image.open(path).tobytes() for path in paths]


def picture(tiny: TinyLumina, folder: Path, *more: str) -> bytes:
    return pixels_of(lumina_inference.run(arguments(tiny, folder, *more)))[0]


def test_equal_options_give_equal_pictures_and_each_option_tells(tiny: TinyLumina, tmp_path: Path) -> None:
    base = picture(tiny, tmp_path)
    assert base == picture(tiny, tmp_path, "--offload") == picture(tiny, tmp_path, "--attn_mode=sdpa")
    changes = (
        ("--seed=6",), ("--prompt=the dog",), ("--guidance_scale=1",), ("--cfg_trunc_ratio=1",), ("--renorm_cfg=0",),
        ("--discrete_flow_shift=1",), ("--steps=3",), ("--negative_prompt=blue",), ("--system_prompt=girl",),
        ("--system_prompt=girl", "--add_system_prompt_to_negative_prompt"),
    )  # fmt: skip
    assert len({base, *(picture(tiny, tmp_path, *more) for more in changes)}) == 1 + len(changes)


def test_all_parts_in_one_file(tiny: TinyLumina, tmp_path: Path) -> None:
    whole = build_tiny_lumina(tmp_path / "whole", whole=True)
    assert picture(whole, tmp_path) == picture(tiny, tmp_path)
    named = [f"--gemma2_path={whole.lumina}", f"--ae_path={whole.lumina}"]
    assert picture(whole, tmp_path, *named) == picture(tiny, tmp_path)


def test_an_adapter_hooked_and_merged_gives_the_same(tiny: TinyLumina, adapter: Path, tmp_path: Path) -> None:
    base = picture(tiny, tmp_path)
    hooked = picture(tiny, tmp_path, "--lora_weights", f"{adapter};0.5")
    merged = picture(tiny, tmp_path, "--lora_weights", f"{adapter};0.5", "--merge_lora_weights")
    assert hooked != base == picture(tiny, tmp_path, "--lora_weights", f"{adapter};0")
    assert max(abs(a - b) for a, b in zip(hooked, merged)) <= 1


def test_lines_typed_and_from_a_file(tiny: TinyLumina, adapter: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    lines = "the dog --d 9 --w 40 --ctr 1 --rcfg 0.5 --fs 3\na cat --x 3\na cat --m 0\na cat --l 2 --n blue\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    more = ["--lora_weights", f"{adapter};0.5"]
    paths = lumina_inference.run(arguments(tiny, tmp_path, "--interactive", *more))
    assert [path.name.split("_", 2)[2] for path in paths] == ["9_00.png", "5_01.png", "5_02.png"]
    with Image.open(paths[0]) as image:  # 5 x 4 latents: an odd side
        assert image.size == (40, 32) and (image.text["cfg-trunc-ratio"], image.text["renorm-cfg"]) == ("1.0", "0.5")
    assert "unknown option --x" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("# two\n" + lines.replace("a cat --x 3\n", ""), encoding="utf-8")
    again = lumina_inference.run(arguments(tiny, tmp_path / "again", f"--from_file={tmp_path / 'prompts.txt'}", *more))
    assert pixels_of(again) == pixels_of(paths)


def test_a_denoiser_in_eight_bits(tiny: TinyLumina, tmp_path: Path) -> None:
    assert picture(tiny, tmp_path, "--dtype=fp8") != picture(tiny, tmp_path, "--dtype=bf16")


def test_every_wrong_file_is_named_before_anything_is_loaded(tiny: TinyLumina, tmp_path: Path) -> None:
    files = [f"--pretrained_model_name_or_path={tiny.ae}", f"--gemma2_path={tiny.lumina}", f"--lora_weights={tiny.ae}"]
    with pytest.raises(ConfigError) as caught:
        lumina_inference.run([*files, "--prompt=x"])
    told = "\n".join(caught.value.problems)
    assert f"--pretrained_model_name_or_path is {tiny.ae}: this is a FLUX.1 or SD3 autoencoder" in told
    assert f"--gemma2_path is {tiny.lumina}: this is a Lumina-Image 2.0 denoiser; needed: a Gemma-2-2B" in told
    assert "--ae_path is not given" in told and f"--lora_weights is {tiny.ae}" in told


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--gemma2_dtype=fp8", "only the denoiser is stored in 8 bits"), ("--cfg_trunc_ratio=2", "a number from 0 to 1"),
        ("--discrete_flow_shift=0", "a number above 0"), ("--image_width=4", "8 or more"), ("--dtype=int3", "known:"),
        ("--gemma2_max_token_length=300", "positions for 299 tokens"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(tiny: TinyLumina, tmp_path: Path, option: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lumina_inference.run([*arguments(tiny, tmp_path), option])


# -- guidance ----------------------------------------------------------------------------------------------------------


class Constant(torch.nn.Module):
    """Gives the number that stands in the states of the text, and notes how many samples it saw at which times."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []

    def forward(self, x, t, cap_feats, cap_mask):
        self.seen.append((len(x), round(float(t[0]), 4)))
        return torch.ones_like(x) * cap_feats[:, :1, :1, None]


def conditioning(*values: float) -> dict[str, torch.Tensor]:
    return {"hidden_state": torch.tensor(values)[:, None, None], "attention_mask": torch.ones(len(values), 1)}


def request(**settings) -> LuminaRequest:
    return LuminaRequest(prompt="", width=32, height=32, seed=1, steps=4, flow_shift=1.0, **settings)


def test_guidance_lasts_as_long_as_it_is_asked_for() -> None:
    """Times 0, 0.25, 0.5, 0.75 of the model, from noise to data: those below the ratio have two forwards."""
    for ratio, doubles in ((0.25, 1), (0.3, 2), (1.0, 4), (0.0, 0)):
        denoiser = Constant()
        denoiser.device = torch.device("cpu")
        pipeline = LuminaPipeline(denoiser, None)
        pipeline.latents(request(cfg_scale=3.0, cfg_trunc_ratio=ratio), conditioning(1.0), conditioning(0.5))
        assert denoiser.seen == [(2 if i < doubles else 1, i / 4) for i in range(4)]


def test_the_guided_velocity_is_no_longer_than_asked_for() -> None:
    pipeline = LuminaPipeline(Constant(), None)
    positive, negative = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    positive[1] *= 100  # whose guided velocity is hardly longer
    free = pipeline.combined(negative, positive, request(cfg_scale=4.0, renorm_cfg=0.0))
    torch.testing.assert_close(free, negative + 4 * (positive - negative))
    bounded = pipeline.combined(negative, positive, request(cfg_scale=4.0, renorm_cfg=1.0))
    lengths = bounded.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, positive.flatten(1).norm(dim=1))
    directions = [torch.nn.functional.normalize(velocity.flatten(1), dim=1) for velocity in (bounded, free)]
    torch.testing.assert_close(*directions)
    wide = pipeline.combined(negative, positive, request(cfg_scale=4.0, renorm_cfg=50.0))
    torch.testing.assert_close(wide, free)


@torch.no_grad()
def test_several_pictures_at_once_are_those_made_alone(tiny: TinyLumina) -> None:
    pipeline = LuminaPipeline(load_lumina(tiny.lumina, torch.float32, "cpu"), None)
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    given = [{"hidden_state": torch.randn(2, 6, 24, generator=generator), "attention_mask": mask} for _ in range(2)]
    settings = {"prompt": "", "width": 64, "height": 32, "steps": 3, "cfg_scale": 3.0, "cfg_trunc_ratio": 0.5}
    requests = [LuminaRequest(seed=seed, **settings) for seed in (4, 9)]
    together = pipeline.latents_together(requests, *given)
    for number, one in enumerate(requests):
        own = [{name: tensor[number : number + 1] for name, tensor in part.items()} for part in given]
        torch.testing.assert_close(together[number : number + 1], pipeline.latents(one, *own), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_steps_are_those_of_the_pipeline_of_diffusers(tiny: TinyLumina) -> None:
    """Sign of the velocity, the model's time, the shifted schedule and guidance, of captions of different lengths."""
    diffusers = pytest.importorskip("diffusers")
    model = load_lumina(tiny.lumina, torch.float32, "cpu", config={"qk_norm_eps": 1e-5})
    theirs = diffusers.Lumina2Transformer2DModel.from_config(LAYOUTS.config(model.params))
    theirs.load_state_dict(to_diffusers(model.state_dict()))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    other = diffusers.Lumina2Pipeline(theirs.eval(), scheduler, None, None, None)
    other.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    given = [
        {"hidden_state": torch.randn(1, 6, 24, generator=generator), "attention_mask": torch.tensor([mask])}
        for mask in ([1] * 6, [1] * 2 + [0] * 4)
    ]
    settings = {"width": 64, "height": 32, "steps": 5, "cfg_scale": 3.0, "cfg_trunc_ratio": 1.0, "renorm_cfg": 0.0}
    mine = LuminaPipeline(model, None).latents(LuminaRequest(prompt="", seed=4, flow_shift=6.0, **settings), *given)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    values = [part[name] for part in given for name in ("hidden_state", "attention_mask")]
    latents = other(
        width=64, height=32, num_inference_steps=5, guidance_scale=3.0, latents=start_noise(4, 16, 4, 8),
        cfg_normalization=False, output_type="latent", **dict(zip(names, values, strict=True)),
    ).images  # fmt: skip
    torch.testing.assert_close(mine, latents, rtol=1e-4, atol=1e-4)


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    lines = lines_file(tmp_path, "a cat", "a dog --s 2 --l 2 --ctr 0.5 --fs 3")
    made = lumina_inference.run(arguments(tiny, tmp_path / "first", lines))
    check_made_again(lumina_inference.run, made, "output_dir")

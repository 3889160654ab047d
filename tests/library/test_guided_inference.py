"""gen_img.py with ControlNets and LLLites: against diffusers and a reference by hand, their steps and pictures, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from library.checkpoints.unet_convert import original_to_diffusers
from library.components.lllite_models import LLLite, new_shapes
from library.core.errors import ConfigError
from library.generation.control_pictures import open_picture
from library.generation.gen_img.guides import _Part, first_resting, prepared
from library.generation.gen_img.options import GenerationControlOptions
from library.generation.gen_img.sources import open_picture as opened
from library.generation.sampling_utils import start_noise
from library.safetensors_utils import save_file_atomic
from library.sdxl_models import SdxlUNet2DConditionModel
from library.sdxl_utils import load_unet_sdxl
from tests.library.test_generation_against_diffusers import our_latents, relative, stable_diffusion, where  # noqa: F401
from tests.library.test_lllite_utils import by_hand, random_tensors, widened
from tests.library.test_sdxl_inference import reference_pipeline
from tests.library.test_unet_inference import distance, made
from tests.tiny_sd import TinySd, build_tiny_sd

LINE = "a red cat --n blue --w 96 --h 64 --l 6 --d 5"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Guide pictures of other sizes than what is made."""
    folder, paths = tmp_path_factory.mktemp("guides"), []
    for number in range(4):
        image = Image.new("RGB", (90 + 10 * number, 60), (20 * number, 90, 200))
        ImageDraw.Draw(image).ellipse((10 + 5 * number, 8, 60, 50), fill=(250, 240 - 60 * number, 10))
        paths.append(folder / f"{number}.png")
        image.save(paths[-1])
    return paths


# -- ControlNet --------------------------------------------------------------------------------------------------------


def control_net(unet: torch.nn.Module, folder: Path, seed: int) -> torch.nn.Module:
    """A ControlNet of diffusers with weights that show, written to a folder."""
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(folder)
    return net.eval()


def test_two_control_nets_as_in_diffusers(stable_diffusion, pictures, tmp_path, monkeypatch):  # noqa: F811
    """With their own strengths and steps, and edges as one of the pictures."""
    import diffusers

    folder, pipeline = stable_diffusion
    nets = [control_net(pipeline.unet, tmp_path / f"net{number}", number) for number in range(2)]
    reference = diffusers.StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=nets, requires_safety_checker=False
    )
    reference.set_progress_bar_config(disable=True)
    plain, edges = (Image.open(path) for path in pictures[:2])
    edges = prepared(edges, (96, 64), (63, 191))
    assert set(numpy.unique(edges)) == {0, 255}
    given = {
        "prompt": "a red cat", "negative_prompt": "blue", "image": [plain, edges], "height": 64, "width": 96,
        "num_inference_steps": 10, "guidance_scale": 6.0, "latents": start_noise(5, 4, 8, 12), "output_type": "latent",
    }  # fmt: skip
    strengths = {"controlnet_conditioning_scale": [0.7, -0.4], "control_guidance_end": [0.55, 1.0]}
    expected = reference(**given, **strengths).images
    words = [
        "--prompt", LINE, "--steps=10", "--control_net_models", str(tmp_path / "net0"), str(tmp_path / "net1"),
        "--guide_image_path", *map(str, pictures[:2]), "--control_net_preps", "none", "canny_63_191",
    ]  # fmt: skip
    ours = our_latents(
        monkeypatch, *where(folder), *words, "--control_net_multipliers", "0.7", "-0.4", "--control_net_ratios", "0.55", "1"
    )
    assert relative(ours, expected) < 1e-4
    everywhere = reference(**given, controlnet_conditioning_scale=[0.7, -0.4]).images
    assert relative(everywhere, expected) > 1e-2, "the share of the steps shows"
    assert relative(our_latents(monkeypatch, *where(folder), "--prompt", LINE, "--steps=10"), expected) > 1e-2


def test_a_control_net_of_sdxl_as_in_diffusers(pictures, tmp_path, monkeypatch):
    import diffusers

    pipeline = reference_pipeline(tmp_path)
    net = control_net(pipeline.unet, tmp_path / "net", 4)
    reference = diffusers.StableDiffusionXLControlNetPipeline(
        **{name: part for name, part in pipeline.components.items() if name not in ("image_encoder", "feature_extractor")},
        controlnet=net, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        "a red cat", negative_prompt="blue", image=Image.open(pictures[2]), height=64, width=96, num_inference_steps=5,
        guidance_scale=6.0, controlnet_conditioning_scale=0.8, latents=start_noise(5, 4, 8, 12), output_type="latent",
        original_size=(64, 96), target_size=(64, 96),
    ).images  # fmt: skip
    words = ["--sdxl", "--prompt", LINE, "--steps=5", "--sampler=euler", "--control_net_multipliers", "0.8"]
    guided = ["--control_net_models", str(tmp_path / "net"), "--guide_image_path", str(pictures[2])]
    assert relative(our_latents(monkeypatch, *where(tmp_path), *words, *guided), expected) < 1e-4


# -- LLLite ------------------------------------------------------------------------------------------------------------


def write_lllite(unet: SdxlUNet2DConditionModel, path: Path, seed: int = 1) -> dict[str, torch.Tensor]:
    net = LLLite(unet, new_shapes(unet, 6, 5))
    tensors = random_tensors(net, seed)
    net.remove()
    save_file_atomic(tensors, path)
    return tensors


def test_an_lllite_as_by_hand(pictures, tmp_path, monkeypatch):
    """The layers of diffusers' U-Net have their inputs changed by formulas that are written out, in the first steps."""
    pipeline = reference_pipeline(tmp_path)
    unet = load_unet_sdxl(tmp_path / "model", torch.float32, "cpu")
    tensors = write_lllite(unet, tmp_path / "net.safetensors")
    resized = numpy.asarray(Image.open(pictures[0]).resize((96, 64), Image.Resampling.LANCZOS))
    shown, multiplier, steps = torch.from_numpy(resized / 127.5 - 1).permute(2, 0, 1)[None].float(), 0.6, 5
    step, layers = [0], dict(pipeline.unet.named_modules())
    paths = {
        path.removesuffix(".weight"): "lllite_unet_" + own.removesuffix(".weight").replace(".", "_")
        for path, own in original_to_diffusers({own: own for own in unet.state_dict()}).items()
    }  # fmt: skip
    for path, name in paths.items():
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if parts:

            def change(layer, inputs, parts=parts):
                [x] = inputs
                return (x + multiplier * by_hand(parts, shown.repeat(len(x), 1, 1, 1), x),) if step[0] < 3 else None

            layers[path].register_forward_pre_hook(change)
    expected = pipeline(
        "a red cat", negative_prompt="blue", height=64, width=96, num_inference_steps=steps, guidance_scale=6.0,
        latents=start_noise(5, 4, 8, 12), output_type="latent", original_size=(64, 96), target_size=(64, 96),
        callback_on_step_end=lambda pipe, number, time, given: step.__setitem__(0, number + 1) or given,
    ).images  # fmt: skip
    words = ["--sdxl", "--prompt", LINE, f"--steps={steps}", "--sampler=euler"]
    guided = [
        "--control_net_lllite_models", str(tmp_path / "net.safetensors"), "--guide_image_path", str(pictures[0]),
        "--control_net_multipliers", str(multiplier), "--control_net_ratios", "0.65",
    ]  # fmt: skip
    assert relative(our_latents(monkeypatch, *where(tmp_path), *words, *guided), expected) < 1e-4
    assert relative(our_latents(monkeypatch, *where(tmp_path), *words), expected) > 1e-2


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySd:
    return build_tiny_sd(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture(scope="module")
def lllite(tiny, tmp_path_factory) -> list[Path]:
    """Files of two LLLites."""
    folder, unet = tmp_path_factory.mktemp("lllite"), SdxlUNet2DConditionModel(tiny.params)
    for number in range(2):
        write_lllite(unet, folder / f"{number}.safetensors", number)
    return sorted(folder.iterdir())


def guided(nets: list[Path], guides: list[Path], *more: str) -> list[str]:
    return [
        "--control_net_lllite_models", *map(str, nets), "--guide_image_path", *map(str, guides), *more,
    ]  # fmt: skip


def test_pictures_take_turns_and_a_batch_shares_nothing(tiny, lllite, pictures, tmp_path):
    """Two nets and four pictures are two turns; both in one batch are what each is alone."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 1\na dog --d 2\na bird --d 3\n", encoding="utf-8")
    words = ["--from_file", str(prompts), "--sequential_file_name", *guided(lllite, pictures)]
    together = made(tiny, tmp_path / "together", *words, "--batch_size=3")
    for number, (text, turn) in enumerate((("a cat --d 1", 0), ("a dog --d 2", 1), ("a bird --d 3", 0))):
        own = pictures[2 * turn : 2 * turn + 2]
        [alone] = made(tiny, tmp_path / f"alone{number}", "--prompt", text, *guided(lllite, own))
        assert distance(alone, together[number]) <= 1
    folder = [str(pictures[0].parent)]
    again = made(tiny, tmp_path / "folder", "--prompt", "a cat --d 1", *guided(lllite, folder))
    assert distance(again[0], together[0]) == 0
    one = made(tiny, tmp_path / "one", "--prompt", "a cat --d 1", *guided(lllite, pictures[:1]))
    both = made(tiny, tmp_path / "both", "--prompt", "a cat --d 1", *guided(lllite, [pictures[0], pictures[0]]))
    assert distance(one[0], both[0]) == 0 and distance(one[0], again[0]) > 0


def test_stages_latents_that_grow_and_steps_without_nets(tiny, lllite, pictures, tmp_path):
    """Sizes that cannot be halved evenly too."""
    line = ["--prompt", "a cat --d 1 --w 104 --h 72"]
    nets = guided(lllite[:1], pictures[:1])

    def make(name: str, *more: str) -> list[Path]:
        return made(tiny, tmp_path / name, *line, "--sampler=euler_a", *more)

    plain, steered = make("plain"), make("steered", *nets)
    assert distance(plain[0], steered[0]) > 0
    assert distance(plain[0], make("never", *nets, "--control_net_ratios", "0")[0]) == 0
    assert distance(plain[0], make("weak", *nets, "--control_net_multipliers", "0")[0]) == 0
    assert distance(steered[0], make("edges", *nets, "--control_net_preps", "canny")[0]) > 0
    grows = ["--gradual_latent_timesteps=990", "--gradual_latent_ratio=0.5", "--gradual_latent_ratio_step=0.5"]
    assert distance(make("grown", *grows, *nets)[0], make("grown_plain", *grows)[0]) > 0
    stages = ["--highres_fix_scale=0.5", "--highres_fix_save_1st", "--highres_fix_steps=2"]
    both, first = make("both", *stages, *nets), make("first", *stages, *nets, "--highres_fix_disable_control_net")
    assert distance(both[0], first[0]) == 0 and distance(both[1], first[1]) > 0


def test_the_share_of_the_steps():
    """Predictions inside a step belong to it: between two timesteps, and below the last one."""
    times = [990.0, 700.0, 400.0, 100.0]
    working = {ratio: sum(time > first_resting(times, ratio) for time in times) for ratio in (0, 0.2, 0.25, 0.6, 0.75, 1)}
    assert working == {0: 0, 0.2: 0, 0.25: 1, 0.6: 2, 0.75: 3, 1: 4}
    assert first_resting([float(time) for time in range(100, 0, -1)], 0.29) == 71

    class Net:
        def follow(self, picture):
            return () if picture is None else (picture,)

    picture = torch.zeros(1, 3, 8, 8)
    for ratio, seen in ((0.5, [True, True, True, False, False]), (1, [True] * 5)):
        part = _Part(Net(), picture, first_resting(times, ratio), stride=8)
        assert [bool(part.at(picture[:, :, :1, :1], time)) for time in (990, 850, 500, 400, 0)] == seen


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, message", [
    ({"control_net_models": ["a"]}, "--control_net_models is given without --guide_image_path"),
    ({"control_net_lllite_models": ["a", "b"], "control_net_multipliers": [1.0], "guide_image_path": ["x"]},
     "--control_net_multipliers has 1 values for 2 nets"),
    ({"control_net_models": ["a"], "control_net_lllite_models": ["b"], "control_net_ratios": [1.5, 0.5],
      "guide_image_path": ["x"]}, "--control_net_ratios is 1.5 0.5; needed"),
    ({"control_net_models": ["a"], "control_net_preps": ["depth"], "guide_image_path": ["x"]}, "has 'depth'; needed: none"),
    ({"control_net_models": ["a"], "control_net_preps": ["canny_9_3"], "guide_image_path": ["x"]}, "has 'canny_9_3'"),
    ({"guide_image_path": ["x"]}, "--guide_image_path is given without a net"),
])  # fmt: skip
def test_options_that_do_not_go_together(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        GenerationControlOptions(**given)


def test_the_order_of_nets_and_their_preprocessors():
    options = GenerationControlOptions(
        control_net_lllite_models=["l"], control_net_models=["c"], control_net_preps=["canny", "canny_1_2"],
        control_net_multipliers=[0.5, 2.0], guide_image_path=["x"],
    )  # fmt: skip
    assert [(net.path, net.multiplier, net.ratio, net.edges) for net in options.guides] == [
        ("c", 0.5, 1.0, (32, 224)), ("l", 2.0, 1.0, (1, 2)),
    ]  # fmt: skip


def test_pictures_are_read_as_those_of_a_dataset(tmp_path):
    """A depth map of 16 bits keeps its shades, and a turned photograph stands upright."""
    steps = numpy.arange(0, 65536, 1024, dtype=numpy.uint16)
    Image.fromarray(numpy.tile(steps, (4, 1))).save(tmp_path / "deep.png")
    turned = Image.Exif()
    turned[0x112] = 6
    Image.new("RGB", (16, 48)).save(tmp_path / "turned.jpg", exif=turned)
    for read in (
        open_picture, lambda path: opened(path, "RGB", "guide_image_path"), lambda path: opened(path, "L", "mask_path"),
    ):  # fmt: skip
        shades = numpy.asarray(read(tmp_path / "deep.png").convert("L"))
        assert numpy.array_equal(shades, numpy.tile(steps // 256, (4, 1)))
        assert read(tmp_path / "turned.jpg").size == (48, 16)


def test_files_that_do_not_fit_are_told_together(tiny, lllite, pictures, tmp_path):
    other = build_tiny_sd(tmp_path / "sd1", "sd1")
    import diffusers

    net = diffusers.ControlNetModel(block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2, norm_num_groups=8)
    net.save_pretrained(tmp_path / "net")
    wide = write_lllite(SdxlUNet2DConditionModel(tiny.params), tmp_path / "wide.safetensors")
    name = next(iter(wide)).partition(".")[0]
    save_file_atomic({**wide, **widened(name, 99)}, tmp_path / "wide.safetensors")
    (tmp_path / "empty.png").touch()
    words = ["--prompt", "a", "--guide_image_path", str(tmp_path / "none.png"), str(tmp_path / "empty.png")]
    with pytest.raises(ConfigError) as caught:
        made(
            tiny, tmp_path / "out", *words, "--control_net_models", str(tmp_path / "net"), "--control_net_lllite_models",
            str(tmp_path / "wide.safetensors"),
        )  # fmt: skip
    told = str(caught.value)
    assert "needed: a ControlNet of SDXL" in told and "has 99 inputs" in told and "none.png" in told
    assert "empty.png is an empty file" in told
    with pytest.raises(ConfigError, match="there are ControlNet-LLLites of SDXL alone"):
        made(other, tmp_path / "out", "--prompt", "a", *guided(lllite[:1], pictures[:1]))
    with pytest.raises(ConfigError, match="has 3 pictures for 2 nets"):
        made(tiny, tmp_path / "out", "--prompt", "a", *guided(lllite, pictures[:3]))
    with pytest.raises(ConfigError, match="Deep Shrink makes the features smaller"):
        made(tiny, tmp_path / "out", "--prompt", "a --dsd1 3", *guided(lllite[:1], pictures[:1]))
    assert not (tmp_path / "out").exists()

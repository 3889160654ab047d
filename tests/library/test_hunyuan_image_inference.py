"""The image script of HunyuanImage 2.1 through its command line, on a tiny base: pictures, guidance, LoRAs, latents,
refusals."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.generation import hunyuan_image_inference
from library.generation.recorded_requests import ENTRY
from library.hunyuan_image_train_utils import ProjectedGuidance
from library.hunyuan_image_utils import load_encoders, load_hunyuan_image, load_vae
from library.safetensors_utils import save_file_atomic
from library.strategy_hunyuan_image import HunyuanImageTextEncodingStrategy, HunyuanImageTokenizeStrategy
from library.tiny_models.hunyuan_image_tiny import TinyHunyuanImage, build_tiny_hunyuan_image
from networks.files.lora_conversion import to_dotted
from tests.library.generation.made_again import check_made_again, lines_file

QUOTED = 'a sign "open"'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuanImage:
    return build_tiny_hunyuan_image(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(tiny: TinyHunyuanImage) -> Path:
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name, rows, columns in (
        ("double_blocks_0_img_attn_qkv", 96, 32),
        ("single_blocks_1_modulation_linear", 96, 32),
    ):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 2
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 2
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    save_file_atomic(tensors, tiny.folder / "lora.safetensors")
    return tiny.folder / "lora.safetensors"


def arguments(
    tiny: TinyHunyuanImage, folder: Path, *more: str, prompt: tuple[str, ...] = ("--prompt=a red cat",)
) -> list[str]:
    return [
        f"--dit={tiny.denoiser}", f"--vae={tiny.vae}", f"--text_encoder={tiny.text_encoder}", f"--byt5={tiny.byt5}",
        f"--text_encoder_tokenizer={tiny.tokenizer}", "--dtype=float32", "--image_size", "64", "96", "--infer_steps=2",
        "--seed=5", f"--save_path={folder}", *prompt, *more,
    ]  # fmt: skip


def pixels(paths: list[Path]) -> list[bytes]:
    return [Image.open(path).tobytes() for path in paths]


def picture(tiny: TinyHunyuanImage, folder: Path, *more: str) -> bytes:
    (made,) = pixels(hunyuan_image_inference.run(arguments(tiny, folder, *more)))
    return made


def largest_difference(first: bytes, second: bytes) -> int:
    return max(abs(a - b) for a, b in zip(first, second))


def test_a_picture_with_its_settings(tiny, tmp_path) -> None:
    (path,) = hunyuan_image_inference.run(arguments(tiny, tmp_path))
    with Image.open(path) as image:
        assert image.size == (96, 64)
        texts = dict(image.text)
        assert texts.pop(ENTRY) and texts == {
            "prompt": "a red cat", "negative-prompt": "", "seed": "5", "steps": "2", "scale": "3.5",
            "flow-shift": "5.0",
        }  # fmt: skip


def test_equal_options_give_equal_pictures_and_each_option_tells(tiny, tmp_path) -> None:
    base = picture(tiny, tmp_path)
    for neutral in (
        "--text_encoder_cpu",
        "--vae_chunk_size=999",
        "--vae_tiling",
        "--attn_mode=sdpa",
        "--blocks_to_swap=0",
        "--apg_start_step_ocr=0",
    ):
        assert picture(tiny, tmp_path, neutral) == base, neutral
    others = [
        ("--seed=6",), ("--prompt=the dog",), (f"--prompt={QUOTED}",), ("--negative_prompt=blue square",),
        ("--guidance_scale=1",),
        ("--flow_shift=1.5",), ("--infer_steps=3",), ("--fp8",), ("--fp8_scaled",), ("--apg_start_step_general=0",),
        ("--guidance_rescale=0.7",), ("--apg_start_step_general=0", "--guidance_rescale_apg=0.7"),
    ]  # fmt: skip
    assert len({base, *(picture(tiny, tmp_path, *more) for more in others)}) == len(others) + 1
    wide = ("--image_size", "64", "416")
    assert picture(tiny, tmp_path, *wide) != picture(tiny, tmp_path, *wide, "--vae_tiling")
    assert picture(tiny, tmp_path, f"--prompt={QUOTED}") != picture(
        tiny, tmp_path, f"--prompt={QUOTED}", "--apg_start_step_ocr=0"
    )


@torch.no_grad()
def test_a_picture_equals_a_plain_loop(tiny, tmp_path) -> None:
    """Tokens, text encoders, two forwards apart, guidance plain and projected, Euler steps and decoding, written
    out."""
    model = load_hunyuan_image(tiny.denoiser, torch.float32, "cpu")
    encoders = load_encoders(tiny.text_encoder, tiny.byt5, torch.float32, "cpu")
    tokenize = HunyuanImageTokenizeStrategy(tokenizer=str(tiny.tokenizer))

    def velocity(x: torch.Tensor, sigma: float, text: str) -> torch.Tensor:
        states = HunyuanImageTextEncodingStrategy().encode_tokens(tokenize, encoders, tokenize.tokenize(text))
        return model(x, torch.tensor([1000 * sigma]), *states[:4])

    x = torch.randn(1, 64, 2, 3, generator=torch.Generator().manual_seed(5))
    sigmas, running = [5 * u / (1 + 4 * u) for u in (1, 3 / 4, 1 / 2, 1 / 4, 0)], 0.0
    for step, (now, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        positive, negative = velocity(x, now, QUOTED), velocity(x, now, "blue")
        running = (positive - negative) - 0.5 * running
        guided = negative + 3.5 * (positive - negative)
        if step > 1:
            change = running * min(1.0, 10 / float(running.norm()))
            guided = negative + 10 * (change - (change * positive).sum() / positive.square().sum() * positive)
        x = x + (after - now) * guided

    more = (f"--prompt={QUOTED}", "--negative_prompt=blue", "--infer_steps=4", "--apg_start_step_ocr=1")
    (path,) = hunyuan_image_inference.run(arguments(tiny, tmp_path, *more, "--output_type=latent"))
    torch.testing.assert_close(load_file(path)["latent"][:, 0][None], x, rtol=1e-4, atol=1e-4)
    decoded = load_vae(tiny.vae, torch.float32, "cpu").decode(x)[0]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8).numpy().tobytes()
    assert largest_difference(picture(tiny, tmp_path, *more), expected) <= 1


def test_projected_guidance_is_that_of_diffusers() -> None:
    guiders = pytest.importorskip("diffusers.guiders")
    theirs = guiders.AdaptiveProjectedMixGuidance(
        guidance_scale=2.5, guidance_rescale=0.3, adaptive_projected_guidance_start_step=1
    )
    theirs.set_state(step=0, num_inference_steps=5, timestep=torch.tensor(1.0))
    theirs.prepare_inputs({})
    ours = ProjectedGuidance(2.5, 1, 0.3, 0.3)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        positive, negative = 4 * torch.randn(2, 2, 8, 3, 4, generator=generator)
        theirs.set_state(step=step, num_inference_steps=5, timestep=torch.tensor(1.0))
        torch.testing.assert_close(
            ours(positive, negative), theirs.forward(positive, negative).pred, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("mean_flow", [False, True])
@torch.no_grad()
def test_a_distilled_model_follows_its_guidance_alone(tmp_path, mean_flow: bool, caplog) -> None:
    tiny = build_tiny_hunyuan_image(tmp_path / "tiny", guidance=True, mean_flow=mean_flow)
    model = load_hunyuan_image(tiny.denoiser, torch.float32, "cpu")
    encoders = load_encoders(tiny.text_encoder, tiny.byt5, torch.float32, "cpu")
    tokenize = HunyuanImageTokenizeStrategy(tokenizer=str(tiny.tokenizer))
    states = HunyuanImageTextEncodingStrategy().encode_tokens(tokenize, encoders, tokenize.tokenize("a red cat"))
    x = torch.randn(1, 64, 2, 3, generator=torch.Generator().manual_seed(5))
    for now, after in ((1.0, 5 / 6), (5 / 6, 0.0)):
        end = {"timestep_r": torch.tensor([1000 * after])} if mean_flow else {}
        x = x + (after - now) * model(
            x, torch.tensor([1000 * now]), *states[:4], guidance=torch.tensor([4000.0]), **end
        )
    more = ("--guidance_scale=4", "--negative_prompt=blue", "--output_type=latent")
    (path,) = hunyuan_image_inference.run(arguments(tiny, tmp_path, *more))
    torch.testing.assert_close(load_file(path)["latent"][:, 0][None], x, rtol=1e-4, atol=1e-4)
    assert "--negative_prompt: no effect" in caplog.text


def test_adapters_hooked_merged_and_written_into_a_model(tiny, adapter, tmp_path) -> None:
    base, lora = picture(tiny, tmp_path), ("--lora_weight", str(adapter), "--lora_multiplier", "0.8")
    hooked = picture(tiny, tmp_path, *lora)
    merged = picture(tiny, tmp_path, *lora, "--merge_lora_weights")
    assert hooked != base and largest_difference(hooked, merged) <= 1
    assert picture(tiny, tmp_path, "--lora_weight", str(adapter), "--lora_multiplier", "0") == base
    part = picture(tiny, tmp_path, *lora, "--include_patterns", "double_blocks")
    assert part not in (base, hooked) and part == picture(
        tiny, tmp_path, *lora, "--exclude_patterns", r"single_blocks\.\d+"
    )
    target = tmp_path / "new" / "merged.safetensors"
    options = [f"--dit={tiny.denoiser}", "--dtype=float32", *lora, f"--save_merged_model={target}"]
    assert hunyuan_image_inference.run(options) == [target]
    assert picture(tiny, tmp_path, f"--dit={target}") == merged
    with pytest.raises(ConfigError, match="which exists"):
        hunyuan_image_inference.run(options)
    with pytest.raises(ConfigError, match="--lora_weight in it, which is not given"):
        hunyuan_image_inference.run([f"--dit={tiny.denoiser}", f"--save_merged_model={tmp_path / 'x.safetensors'}"])


def test_latents_are_written_and_decoded(tiny, tmp_path) -> None:
    expected = picture(tiny, tmp_path / "a")
    (path,) = hunyuan_image_inference.run(arguments(tiny, tmp_path / "b", "--output_type=latent_images"))
    (latents,) = path.parent.glob("*_latent.safetensors")
    assert pixels([path]) == [expected] and load_file(latents)["latent"].shape == (64, 1, 2, 3)
    decode = [f"--vae={tiny.vae}", "--dtype=float32", f"--save_path={tmp_path / 'c'}", "--latent_path", str(latents)]
    assert pixels(hunyuan_image_inference.run(decode)) == [expected]


def test_prompts_from_a_file_and_typed_ones(tiny, adapter, tmp_path, monkeypatch) -> None:
    content = f"a red cat --g 1 --fs 2 --h 96\na red cat --m 0 --d 5\n{QUOTED} --n blue --s 3 --l 2\n"
    (tmp_path / "prompts.txt").write_text(content, encoding="utf-8")
    lora = ("--lora_weight", str(adapter))
    from_file = hunyuan_image_inference.run(
        arguments(tiny, tmp_path / "a", f"--from_file={tmp_path / 'prompts.txt'}", *lora, prompt=())
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(content + "\n"))
    typed = hunyuan_image_inference.run(arguments(tiny, tmp_path / "b", "--interactive", *lora, prompt=()))
    assert len(from_file) == 3 and pixels(from_file) == pixels(typed)
    assert Image.open(from_file[0]).size == (96, 96) and pixels(from_file)[1] == picture(tiny, tmp_path)
    assert Image.open(from_file[2]).text["negative-prompt"] == "blue"


def test_an_adapter_of_layers_that_another_family_has_too_is_told_by_its_width(tiny, adapter, tmp_path) -> None:
    tensors = {key: tensor for key, tensor in load_file(adapter).items() if "attn_qkv" in key}
    save_file_atomic(tensors, tmp_path / "a.safetensors")
    assert picture(tiny, tmp_path, "--lora_weight", str(tmp_path / "a.safetensors")) != picture(tiny, tmp_path)
    down = next(key for key in tensors if "lora_down" in key)
    save_file_atomic({**tensors, down: torch.zeros(4, 3072)}, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="for FLUX.1"):
        picture(tiny, tmp_path, "--lora_weight", str(tmp_path / "b.safetensors"))


@pytest.mark.parametrize(("more", "words"), [
    (("--image_size", "16", "64"), "32 or more each"), (("--flow_shift=0",), "above 0"),
    (("--vae_chunk_size=0",), "1 or more"),
    (("--dtype=fp8",), "--fp8_scaled"), (("--guidance_rescale=2",), "a share"),
    (("--blocks_to_swap=1",), "allows at most 0"),
    (("--text_encoder_tokenizer=none",), "text_encoder_tokenizer"),
    (("--latent_path", "none.safetensors"), "no such file"),
])  # fmt: skip
def test_bad_options(tiny, tmp_path, more: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        hunyuan_image_inference.run(arguments(tiny, tmp_path, *more))


def test_every_wrong_file_is_named_before_anything_is_loaded(tiny, tmp_path) -> None:
    with pytest.raises(ConfigError) as caught:
        hunyuan_image_inference.run([
            f"--dit={tiny.vae}", f"--vae={tiny.byt5}", f"--text_encoder={tiny.denoiser}", f"--byt5={tiny.text_encoder}",
            "--lora_weight", str(tiny.byt5), "--prompt=a",
        ])  # fmt: skip
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "--save_path", "--dit", "--vae", "--text_encoder", "--byt5", "--lora_weight",
    ]  # fmt: skip


def test_layers_that_another_package_does_not_find_are_told(tiny, adapter, tmp_path, caplog) -> None:
    """LyCORIS makes adapters by our names; a file under ComfyUI's has some that are others."""
    pytest.importorskip("lycoris")
    plain, comfy = picture(tiny, tmp_path), tmp_path / "comfy.safetensors"
    caplog.clear()
    ours = picture(tiny, tmp_path, "--lora_weight", str(adapter))
    theirs = picture(tiny, tmp_path, "--lora_weight", str(adapter), "--lycoris")
    assert largest_difference(theirs, ours) <= 1 < largest_difference(ours, plain)
    assert "of its" not in caplog.text
    save_file_atomic(to_dotted("hunyuan_image", load_file(adapter)), comfy)
    assert picture(tiny, tmp_path, "--lora_weight", str(comfy)) == ours
    picture(tiny, tmp_path, "--lora_weight", str(comfy), "--lycoris")
    assert "lycoris.kohya finds 1 of its 2 layers" in caplog.text


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    lines = lines_file(tmp_path, "a cat", "a dog --l 2 --n blue --s 1 --w 64")
    made = hunyuan_image_inference.run(arguments(tiny, tmp_path / "first", lines, prompt=()))
    check_made_again(hunyuan_image_inference.run, made, "save_path")


def test_forms_of_guidance_hold_beside_the_projected_one() -> None:
    """By a model whose velocities are known for each text."""
    from library.generation.hunyuan_image_options import HunyuanImageRequest
    from library.generation.hunyuan_image_pipeline import HunyuanImagePipeline
    from library.hunyuan_image_train_utils import ProjectedGuidance

    draws = torch.Generator().manual_seed(2)
    forwards = [torch.randn(1, 64, 2, 3, generator=draws) for _ in range(3)]  # negative, prompt, empty
    rows_seen: list[int] = []

    class Given(HunyuanImagePipeline):
        def velocity(self, latents, times, conditioning, request, next_times=None):
            rows_seen.append(len(latents))
            return torch.cat(forwards[: len(latents)] if len(latents) > 1 else forwards[1:2])

    class Plain:
        device = torch.device("cpu")
        params = type("Params", (), {"guidance_embed": False})

    text = {"ocr_mask": torch.zeros(1, 2), "vlm_mask": torch.ones(1, 3)}
    pipeline = Given(Plain(), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("library.generation.hunyuan_image_pipeline.needed_text", lambda given: given)

        def velocities(**settings) -> list[torch.Tensor]:
            request = HunyuanImageRequest(prompt="", width=96, height=64, steps=4, apg_start_step_general=1, **settings)
            pipeline.further = {name: text for name in request.further_texts}
            sigmas = pipeline.sigmas(request)
            velocity = pipeline.scheduled(request, sigmas, text, text)
            return [velocity(torch.zeros(1, 64, 2, 3), sigma) for sigma in sigmas[:-1]]

        negative, positive, empty = forwards
        plain = ProjectedGuidance(3.5, 1)
        for found, expected in zip(velocities(), [plain(positive, negative) for _ in range(4)], strict=True):
            torch.testing.assert_close(found, expected)
        p, n = positive - empty, negative - empty
        away = n - (n * p).sum() / (p * p).sum() * p
        torch.testing.assert_close(velocities(perp_neg=2.0)[0], empty + 3.5 * (p - 2 * away))
        rows_seen.clear()
        scheduled = velocities(cfg_schedule="1:2,4")
        assert rows_seen == [2, 1, 1, 2]
        torch.testing.assert_close(scheduled[0], negative + 2 * (positive - negative))
        assert torch.equal(scheduled[1], positive) and not torch.allclose(scheduled[3], positive)

"""The image script of Anima through its command line, on a tiny base: pictures, LoRAs, latents, refusals."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.core.errors import CheckpointError, ConfigError
from library.generation import anima_inference
from library.generation.recorded_requests import ENTRY
from library.safetensors_utils import load_safetensors, save_file_atomic
from tests.library.generation.made_again import check_made_again, lines_file
from tests.tiny_anima import build_tiny_anima

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_anima(tmp_path_factory.mktemp("tiny"))


def write_adapter(
    path: Path, seed: int, layers: tuple[str, ...] = ("blocks_0_self_attn_q_proj", "blocks_1_mlp_layer1")
) -> Path:
    """A LoRA with weights that show."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in layers:
        rows = 96 if name.endswith("layer1") else 48
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, 48, generator=generator) / 2
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 2
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    for name in ("q_proj", "o_proj"):
        rows, columns = (32, 24) if name == "q_proj" else (24, 32)
        key = f"lora_te_layers_1_self_attn_{name}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 4
        tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 4
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    save_file_atomic(tensors, path)
    return path


@pytest.fixture(scope="module")
def adapters(tiny) -> tuple[Path, Path]:
    return write_adapter(tiny.folder / "one.safetensors", 4), write_adapter(tiny.folder / "two.safetensors", 5)


def arguments(tiny, folder, *more: str, prompt: tuple[str, ...] = ("--prompt=a red cat",)) -> list[str]:
    options = [
        f"--dit={tiny.anima}", f"--vae={tiny.vae}", f"--text_encoder={tiny.qwen3}",
        f"--qwen3_tokenizer={tiny.qwen3_tokenizer}",
        f"--t5_tokenizer_path={tiny.t5_tokenizer}", "--qwen3_max_token_length=24", "--t5_max_token_length=32",
        "--dtype=float32",
        "--image_size", "32", "48", "--infer_steps=2", "--seed=5", f"--save_path={folder}", *prompt,
    ]  # fmt: skip
    return [*options, *more]  # of an option that is given twice the last one counts


def pixels(paths) -> list[bytes]:
    return [Image.open(path).tobytes() for path in paths]


def picture(tiny, folder, *more: str) -> bytes:
    (made,) = pixels(anima_inference.run(arguments(tiny, folder, *more)))
    return made


def test_a_picture_with_its_settings(tiny, tmp_path):
    (path,) = anima_inference.run(arguments(tiny, tmp_path / "new"))
    assert path.parent == tmp_path / "new" and path.name.endswith("_5_00.png") and list(path.parent.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.size == (48, 32)
        texts = dict(image.text)
        assert texts.pop(ENTRY) and texts == {
            "prompt": "a red cat", "negative-prompt": "", "seed": "5", "steps": "2", "scale": "3.5",
            "flow-shift": "5.0", "sampler": "euler",
        }  # fmt: skip
    (bare,) = anima_inference.run(arguments(tiny, tmp_path, "--no_metadata"))
    assert not Image.open(bare).text and pixels([bare]) == pixels([path])


def test_equal_options_give_equal_pictures_and_each_option_tells(tiny, tmp_path):
    base = picture(tiny, tmp_path)
    for neutral in (
        "--text_encoder_cpu",
        "--vae_chunk_size=2",
        "--vae_disable_cache",
        "--attn_mode=sdpa",
        "--device=cpu",
    ):
        assert picture(tiny, tmp_path, neutral) == base, neutral
    others = [
        ("--seed=6",), ("--prompt=the dog",), ("--negative_prompt=blue square",), ("--guidance_scale=1",),
        ("--guidance_scale=0.5",),
        ("--flow_shift=1.5",), ("--infer_steps=3",), ("--sampler=er_sde", "--infer_steps=3"),
        ("--fp8", "--dtype=bfloat16"),
        ("--t5_max_token_length=30",),
    ]  # fmt: skip
    assert len({base, *(picture(tiny, tmp_path, *more) for more in others)}) == len(others) + 1
    without_cfg = picture(tiny, tmp_path, "--guidance_scale=1")
    assert without_cfg == picture(tiny, tmp_path, "--guidance_scale=1", "--negative_prompt=blue square")


@torch.no_grad()
def test_a_picture_equals_a_plain_loop(tiny, tmp_path):
    """Tokens, text encoder, CFG, shifted Euler steps and decoding, written out."""
    from library.anima_utils import load_anima
    from library.components.llm_encoder_utils import load_qwen3
    from library.components.tokenizers import load_qwen3_tokenizer, load_t5_tokenizer
    from library.components.wan_vae_utils import load_wan_vae

    model, qwen3 = load_anima(tiny.anima, torch.float32, "cpu"), load_qwen3(tiny.qwen3, torch.float32, "cpu")
    tokenizers = (
        (load_qwen3_tokenizer(str(tiny.qwen3_tokenizer), None, None), 24),
        (load_t5_tokenizer(str(tiny.t5_tokenizer), None), 32),
    )

    def velocity(x, sigma, text):
        (ids, mask), (t5_ids, t5_mask) = (
            tokenizer([text], padding="max_length", max_length=length, return_tensors="pt").values() for tokenizer,
            length in tokenizers
        )
        states = qwen3(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        context = model.llm_adapter(states, t5_ids, t5_mask, mask)
        return model(x, torch.tensor([sigma]), context)

    x = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(5))[:, :, None]
    sigmas = [5 * u / (1 + 4 * u) for u in (1, 3 / 4, 1 / 2, 1 / 4, 0)]
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        positive, negative = velocity(x, now, "a red cat"), velocity(x, now, "blue square")
        x = x + (after - now) * (negative + 3.5 * (positive - negative))

    (path,) = anima_inference.run(
        arguments(tiny, tmp_path, "--infer_steps=4", "--negative_prompt=blue square", "--output_type=latent")
    )
    torch.testing.assert_close(load_safetensors(path, "cpu")["latent"][None], x, rtol=1e-4, atol=1e-4)
    made = anima_inference.run(arguments(tiny, tmp_path, "--infer_steps=4", "--negative_prompt=blue square"))[0]
    decoded = load_wan_vae(tiny.vae, torch.float32, "cpu").decode(x)[0, :, 0]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8).numpy().tobytes()
    assert max(abs(a - b) for a, b in zip(pixels([made])[0], expected)) <= 1


def largest_difference(first: bytes, second: bytes) -> int:
    return max(abs(a - b) for a, b in zip(first, second))


def test_adapters(tiny, adapters, tmp_path):
    one, two = map(str, adapters)
    base = picture(tiny, tmp_path)
    hooked = picture(tiny, tmp_path, "--lora_weight", one, "--lora_multiplier", "0.8")
    assert hooked != base
    assert picture(tiny, tmp_path, "--lora_weight", one, "--lora_multiplier", "0") == base
    merged = picture(tiny, tmp_path, "--lora_weight", one, "--lora_multiplier", "0.8", "--merge_lora_weights")
    assert largest_difference(hooked, merged) <= 1
    both = picture(tiny, tmp_path, "--lora_weight", one, two, "--lora_multiplier", "0.8", "0.5")
    assert both not in (hooked, base, picture(tiny, tmp_path, "--lora_weight", two, "--lora_multiplier", "0.5"))
    assert both != picture(
        tiny, tmp_path, "--lora_weight", one, two, "--lora_multiplier", "0.8"
    )  # one multiplier holds for all
    merged = picture(
        tiny, tmp_path, "--lora_weight", one, two, "--lora_multiplier", "0.8", "0.5", "--merge_lora_weights"
    )
    assert largest_difference(both, merged) <= 1


def test_patterns_choose_layers(tiny, adapters, tmp_path):
    base = picture(tiny, tmp_path)
    one = ("--lora_weight", str(adapters[0]))
    whole = picture(tiny, tmp_path, *one)
    denoiser = picture(tiny, tmp_path, *one, "--include_patterns", "^lora_unet")
    assert len({base, whole, denoiser}) == 3
    assert picture(tiny, tmp_path, *one, "--exclude_patterns", r"layers\.\d+\.self_attn") == denoiser
    attention = picture(
        tiny, tmp_path, *one, "--include_patterns", r"blocks\.\d+\.self_attn", "mlp", "--exclude_patterns", "mlp"
    )
    assert attention not in (base, whole, denoiser)
    merged = picture(tiny, tmp_path, *one, "--include_patterns", r"blocks\.\d+\.self_attn", "--merge_lora_weights")
    assert largest_difference(attention, merged) <= 1
    with pytest.raises(ConfigError, match="none of the 4 layers"):
        picture(tiny, tmp_path, *one, "--include_patterns", "double_blocks")


def test_lycoris_reads_the_same_file(tiny, tmp_path):
    pytest.importorskip("lycoris")
    tensors = load_safetensors(write_adapter(tmp_path / "all.safetensors", 6), "cpu")
    path = tmp_path / "denoiser.safetensors"
    save_file_atomic({name: tensor for name, tensor in tensors.items() if name.startswith("lora_unet")}, path)
    own = picture(tiny, tmp_path, "--lora_weight", str(path), "--lora_multiplier", "0.7")
    theirs = picture(tiny, tmp_path, "--lora_weight", str(path), "--lora_multiplier", "0.7", "--lycoris")
    assert own != picture(tiny, tmp_path) and largest_difference(own, theirs) <= 1


def test_eight_bits(tiny, adapters, tmp_path):
    from library.anima_utils import takes_scale
    from library.generation.anima_pipeline import load_denoiser

    options = anima_inference.AnimaModelOptions(dit=str(tiny.anima), fp8_scaled=True, dtype="float32")
    scaled = dict(load_denoiser(options, torch.float32, torch.device("cpu")).named_modules())
    plain = dict(
        load_denoiser(
            dataclasses.replace(options, fp8_scaled=False, fp8=True), torch.float32, torch.device("cpu")
        ).named_modules()
    )
    whole = dict(
        load_denoiser(
            dataclasses.replace(options, fp8_scaled=False), torch.float32, torch.device("cpu")
        ).named_modules()
    )
    names = {
        name
        for name, module in scaled.items()
        if getattr(module, "weight", None) is not None and module.weight.dtype == torch.float8_e4m3fn
    }
    assert (
        names == {n for n, m in whole.items() if isinstance(m, torch.nn.Linear) and takes_scale(n)} and len(names) == 30
    )
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    name = "blocks.0.mlp.layer1"
    far = [(modules[name](x) - whole[name](x)).norm() / whole[name](x).norm() for modules in (scaled, plain)]
    assert far[0] < 0.04 and plain[name].weight.dtype == torch.float8_e4m3fn
    base, lora = picture(tiny, tmp_path, "--fp8_scaled"), ("--lora_weight", str(adapters[0]))
    assert len({base, picture(tiny, tmp_path, "--fp8_scaled", *lora), picture(tiny, tmp_path, "--fp8", *lora)}) == 3
    merged = [picture(tiny, tmp_path, kind, *lora, "--merge_lora_weights") for kind in ("--fp8", "--fp8_scaled")]
    assert base not in merged and len(set(merged)) == 2
    with pytest.raises(ConfigError, match="--lycoris needs whole weights"):
        picture(tiny, tmp_path, "--fp8", *lora, "--lycoris")


def test_latents_are_written_and_decoded(tiny, tmp_path, caplog):
    expected = picture(tiny, tmp_path / "a")
    (path,) = anima_inference.run(arguments(tiny, tmp_path / "b", "--output_type=latent_images"))
    (latents,) = path.parent.glob("*_latent.safetensors")
    assert pixels([path]) == [expected] and load_safetensors(latents, "cpu")["latent"].shape == (16, 1, 4, 6)
    decode = [f"--vae={tiny.vae}", "--dtype=float32", f"--save_path={tmp_path / 'c'}", "--latent_path", str(latents)]
    idle = ["--infer_steps=9", "--cfg_schedule=1", "--prompt_wildcards", str(tmp_path), "--image_size", "64", "64"]
    caplog.set_level("INFO")
    (decoded,) = anima_inference.run([*decode[:-2], *idle, *decode[-2:]])
    told = [record.message.split()[0] for record in caplog.records if "nothing is sampled" in record.message]
    assert told == ["--cfg_schedule", "--image_size", "--infer_steps", "--prompt_wildcards"]
    assert pixels([decoded]) == [expected] and Image.open(decoded).text["prompt"] == "a red cat"
    (alone,) = anima_inference.run(
        [a for a in arguments(tiny, tmp_path / "d", "--output_type=latent") if not a.startswith("--vae")]
    )
    assert torch.equal(load_safetensors(alone, "cpu")["latent"], load_safetensors(latents, "cpu")["latent"])
    with pytest.raises(CheckpointError, match="holds no latents"):
        anima_inference.run([*decode[:-1], str(tiny.anima)])
    save_file_atomic({"latent": torch.zeros(4, 1, 8, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"\[4, 1, 8, 8\]; needed: \[16, 1,"):
        anima_inference.run([*decode[:-1], str(tmp_path / "other.safetensors")])


def test_prompts_from_a_file_and_typed_ones(tiny, adapters, tmp_path, monkeypatch):
    content = "a red cat --g 1 --fs 2 --h 48\na red cat --m 0 --d 5\na red cat\nthe dog --n blue --s 3 --l 2\n"
    (tmp_path / "prompts.txt").write_text(content, encoding="utf-8")
    lora = ("--lora_weight", str(adapters[0]))
    from_file = anima_inference.run(
        arguments(tiny, tmp_path / "a", f"--from_file={tmp_path / 'prompts.txt'}", *lora, prompt=())
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(content.replace("the dog", "--q 3\nthe dog") + "\n"))
    typed = anima_inference.run(arguments(tiny, tmp_path / "b", "--interactive", *lora, prompt=()))
    assert len(from_file) == 4 and pixels(from_file) == pixels(typed)
    assert Image.open(from_file[0]).size == (48, 48)
    assert pixels(from_file)[1:3] == [
        picture(tiny, tmp_path),
        picture(tiny, tmp_path, *lora),
    ]  # --m counts for its line alone
    assert Image.open(from_file[3]).text["negative-prompt"] == "blue"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--lora_multiplier", "1", "2"), "2 values for 0"),
        (("--include_patterns", "("), "no regular expression"),
        (("--image_size", "8", "64"), "16 or more each"),
        (("--flow_shift=0",), "above 0"),
        (("--vae_chunk_size=3",), "even number"),
        (("--dtype=fp8",), "--fp8_scaled"),
        (("--from_file=none.txt",), "none.txt, which does not exist"),
        (("--device=cuda:77",), "--device is .cuda:77"),
        (("--latent_path", "none.safetensors"), "there is no such file"),
        (("--t5_tokenizer_path=none",), "t5_tokenizer_path"),
    ],
)
def test_bad_options(tiny, tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        anima_inference.run(arguments(tiny, tmp_path, *more))


def test_every_wrong_file_is_named_before_anything_is_loaded(tiny, tmp_path):
    with pytest.raises(ConfigError) as caught:
        anima_inference.run([
            f"--dit={tiny.vae}", f"--vae={tmp_path / 'none'}", f"--text_encoder={tiny.anima}", "--lora_weight",
            str(tiny.qwen3),
            "--from_file=none.txt",
        ])  # fmt: skip
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "--save_path", "--dit", "--vae", "--text_encoder", "--lora_weight", "--from_file",
    ]  # fmt: skip


def test_parts_of_other_sizes_are_named(tiny, tmp_path):
    other = build_tiny_anima(tmp_path / "other", adapter=False)
    tensors = load_safetensors(tiny.anima, "cpu")
    narrow = {key: tensor for key, tensor in tensors.items() if ".llm_adapter." not in key}
    for key in narrow:
        if "cross_attn.k_proj" in key or "cross_attn.v_proj" in key:
            narrow[key] = narrow[key][:, :20].contiguous()
    save_file_atomic(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(ConfigError, match="its width is 24, the model .* takes 20"):
        anima_inference.run(arguments(tiny, tmp_path, f"--dit={tmp_path / 'narrow.safetensors'}"))
    without_adapter = picture(tiny, tmp_path, f"--dit={other.anima}")
    with_adapter = picture(tiny, tmp_path, f"--dit={other.anima}", f"--llm_adapter_path={tiny.anima}")
    assert without_adapter != with_adapter


def test_the_script_ends_with_one_message_and_a_code(tmp_path):
    command = [sys.executable, "anima_minimal_inference.py", "--dit", "none.safetensors", f"--save_path={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "none.safetensors" in result.stderr and "Traceback" not in result.stderr


def test_scaled_rows_of_any_size_keep_their_digits():
    from library.fp8_optimization_utils import store_layers

    layer = torch.nn.Linear(64, 4)
    weight = (
        torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * torch.tensor([1e-5, 1.0, 1e5, 0.0])[:, None]
    )
    layer.weight.data, x = weight.clone(), torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = layer(x)
        assert store_layers(torch.nn.Sequential(layer), "fp8_scaled", wanted=lambda path: path == "0") == 1
        far = (layer(x) - expected).norm(dim=0) / (expected - layer.bias).norm(dim=0).clamp_min(1e-9)
    assert layer.weight.float().abs().amax(dim=1).tolist() == [448, 448, 448, 0] and float(far.max()) < 0.05


def test_a_file_under_the_names_of_comfyui_is_the_same_adapter(tiny, adapters, tmp_path):
    from networks.files.lora_conversion import to_dotted

    tensors = {
        key: tensor for key, tensor in load_safetensors(adapters[0], "cpu").items() if key.startswith("lora_unet")
    }
    save_file_atomic(tensors, tmp_path / "own.safetensors")
    save_file_atomic(to_dotted("anima", tensors), tmp_path / "comfy.safetensors")
    own, comfy = (
        picture(tiny, tmp_path, "--lora_weight", str(tmp_path / f"{name}.safetensors")) for name in ("own", "comfy")
    )
    assert own == comfy != picture(tiny, tmp_path)


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    lines = lines_file(tmp_path, "a cat", "a dog --g 1 --fs 2 --h 48 --s 1")
    made = anima_inference.run(arguments(tiny, tmp_path / "first", lines, prompt=()))
    check_made_again(anima_inference.run, made, "save_path")

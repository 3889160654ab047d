"""The image script through its command line, with and without an adapter, on a tiny base."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.generation import flux_inference
from library.generation.adapter_files import parse_adapter_argument
from library.generation.flux_inference import complete
from library.generation.flux_options import LINE_OPTIONS, FluxRequest, InferenceModelOptions
from library.generation.script import LineReader
from library.safetensors_utils import save_file_atomic
from tests.tiny import build_tiny_flux

ROOT = Path(__file__).parents[2]
DEFAULT = FluxRequest(prompt="a cat", width=64, height=32)
READER = LineReader(LINE_OPTIONS, 16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(tiny) -> Path:
    """A LoRA with weights that show."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, size_in, size_out in (("double_blocks_0_img_attn_qkv", 32, 96), ("single_blocks_0_linear2", 160, 32)):
        key = f"lora_unet_{name}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, size_in, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(size_out, 4, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    path = tiny.folder / "adapter.safetensors"
    save_file_atomic(tensors, path)
    return path


def arguments(tiny, tmp_path, *more: str) -> list[str]:
    return [
        f"--ckpt_path={tiny.flux}", f"--ae={tiny.ae}", f"--clip_l={tiny.clip_l}", f"--t5xxl={tiny.t5xxl}",
        f"--clip_l_tokenizer={tiny.clip_l_tokenizer}", "--t5xxl_max_token_length=16", "--dtype=float32", "--width=64",
        "--height=32", "--steps=2", f"--output_dir={tmp_path}",
        *(more if any("--seed" in m for m in more) else ("--seed=5", *more)),
    ]


def pixels_of(paths) -> list[bytes]:
    return [Image.open(path).tobytes() for path in paths]


def picture(tiny, tmp_path, *more: str) -> bytes:
    return pixels_of(flux_inference.run(arguments(tiny, tmp_path, *more)))[0]


def test_a_picture_has_seed_and_number_in_its_name(tiny, tmp_path):
    (path,) = flux_inference.run(arguments(tiny, tmp_path))
    assert (
        path.parent == tmp_path
        and path.name.endswith("_5_00.png")
        and len(path.name) == len("20250102_030405_5_00.png")
    )
    with Image.open(path) as image:
        assert image.size == (64, 32)
    assert list(tmp_path.iterdir()) == [path]


def test_equal_options_give_equal_pictures_and_each_option_tells(tiny, tmp_path):
    base = picture(tiny, tmp_path)
    assert base == picture(tiny, tmp_path, "--offload")
    with_cfg = picture(tiny, tmp_path, "--negative_prompt=blue", "--cfg_scale=4")
    others = [
        picture(tiny, tmp_path, *more)
        for more in (("--seed=6",), ("--prompt=the dog",), ("--guidance=9",), ("--steps=3",))
    ]
    assert len({base, with_cfg, *others}) == 6
    assert base == picture(tiny, tmp_path, "--negative_prompt=blue")  # no CFG, no effect


def test_an_adapter_changes_the_picture_and_merging_gives_the_same(tiny, adapter, tmp_path):
    base = picture(tiny, tmp_path)
    hooked = picture(tiny, tmp_path, "--lora_weights", f"{adapter};0.8")
    merged = picture(tiny, tmp_path, "--lora_weights", f"{adapter};0.8", "--merge_lora_weights")
    off = picture(tiny, tmp_path, "--lora_weights", f"{adapter};0")
    assert hooked != base and off == base
    largest = max(abs(a - b) for a, b in zip(hooked, merged))
    assert largest <= 1, "hooked and merged adapters round differently by one step at most"


def test_interactive_lines(tiny, adapter, tmp_path, monkeypatch, capsys):
    lines = "the dog --d 9 --w 32\na cat --x 3\na cat --m 0\na cat\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    paths = flux_inference.run(arguments(tiny, tmp_path, "--interactive", "--lora_weights", f"{adapter};1"))
    assert [path.name.split("_", 2)[2] for path in paths] == ["9_00.png", "5_01.png", "5_02.png"]
    made = pixels_of(paths)
    assert Image.open(paths[0]).size == (32, 32)
    assert made[1] != made[2]  # --m counts for its line alone
    assert "unknown option --x" in capsys.readouterr().err


def test_a_denoiser_in_eight_bits(tiny, tmp_path):
    assert picture(tiny, tmp_path, "--dtype=bfloat16", "--flux_dtype=fp8") != picture(
        tiny, tmp_path, "--dtype=bfloat16"
    )


def test_every_wrong_file_is_named_before_anything_is_loaded(tiny, tmp_path):
    with pytest.raises(ConfigError) as caught:
        flux_inference.run(
            [
                f"--ckpt_path={tiny.ae}",
                f"--ae={tmp_path / 'none'}",
                f"--t5xxl={tiny.t5xxl}",
                "--lora_weights",
                f"{tiny.flux};x",
                str(tiny.flux),
            ]
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "--clip_l is not given" in text and "multiplier" in text and "FLUX.1 or SD3 autoencoder" in text


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("a dog", {"prompt": "a dog"}),
        ("--s 3", {"steps": 3}),
        ("a dog --w 96 --H 64 --s 4 --d 8 --g 1.5 --c 2 --n bad, ugly", {
            "prompt": "a dog", "width": 96, "height": 64, "steps": 4, "seed": 8, "guidance": 1.5, "cfg_scale": 2.0,
            "negative_prompt": "bad, ugly",
        }),
        ("a dog --m 0.5,-1 --n -", {"prompt": "a dog", "multipliers": (0.5, -1.0), "negative_prompt": ""}),
        ("w 100 meters, state-of-the-art", {"prompt": "w 100 meters, state-of-the-art"}),
    ],
)
def test_prompt_lines(line, changes):
    import dataclasses

    assert READER.read(line, DEFAULT) == dataclasses.replace(DEFAULT, **changes)


@pytest.mark.parametrize(
    ("line", "words"), [("a --w wide", "a whole number"), ("a --q 3", "unknown option --q"), ("a --h 3", "16 or more")]
)
def test_bad_prompt_lines(line, words):
    with pytest.raises(ConfigError, match=words):
        READER.read(line, DEFAULT)


def test_what_is_left_open_is_completed():
    import dataclasses

    request = complete(dataclasses.replace(DEFAULT, width=75, height=47), is_schnell=True)
    assert (request.width, request.height, request.steps) == (64, 32, 4) and request.seed is not None
    assert complete(DEFAULT, is_schnell=False).steps == 50


def test_arguments():
    adapters = [parse_adapter_argument(text) for text in ("a;b.safetensors;0.5", "a")]
    assert [(adapter.path, adapter.multiplier) for adapter in adapters] == [("a;b.safetensors", 0.5), ("a", 1.0)]
    options = InferenceModelOptions(dtype="fp8")
    assert options.dtype_of("flux_dtype") == "float8_e4m3fn" and options.dtype_of("ae_dtype") == "bfloat16"
    with pytest.raises(ConfigError) as caught:
        InferenceModelOptions(dtype="int4", ae_dtype="fp8", flux_dtype="fp8", merge_lora_weights=True)
    assert len(caught.value.problems) == 2


def test_the_script_ends_with_one_message_and_a_code():
    result = subprocess.run(
        [sys.executable, "flux_minimal_inference.py", "--ckpt_path", "none.safetensors"], cwd=ROOT, capture_output=True,
        text=True
    )
    assert result.returncode == 2 and "none.safetensors" in result.stderr and "Traceback" not in result.stderr


def test_help_imports_no_torch():
    code = "import sys; from library.generation import flux_inference; flux_inference.build_parser().format_help(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"]

"""gen_img.py and sdxl_gen_img.py through their command line, on tiny models."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from library.core.errors import AtelierError, ConfigError
from library.generation.gen_img import script as unet_inference
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.training.inference_samplers import SAMPLER_NAMES
from tests.library.test_sdxl_inference import write_adapter
from tests.tiny_sd import KINDS, TinySd, build_tiny_sd
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
KNOWN_OPTIONS = """
    H W batch_size bf16 ckpt clip_skip clip_vision_strength console_log_file console_log_level
    console_log_simple control_net_lllite_models control_net_models control_net_multipliers control_net_preps
    control_net_ratios crop_left crop_top diffusers_xformers ds_depth_1 ds_depth_2 ds_ratio ds_timesteps_1
    ds_timesteps_2 emb_normalize_mode force_scheduler_zero_steps_offset fp16 from_file from_module
    gradual_latent_every_n_steps gradual_latent_ratio gradual_latent_ratio_step gradual_latent_s_noise
    gradual_latent_timesteps gradual_latent_unsharp_params guide_image_path highres_fix_disable_control_net
    highres_fix_latents_upscaling highres_fix_save_1st highres_fix_scale highres_fix_steps
    highres_fix_strength highres_fix_upscaler highres_fix_upscaler_args image_path images_per_prompt
    interactive iter_same_seed mask_path max_embeddings_multiples n_iter negative_scale network_args
    network_merge network_merge_n_models network_module network_mul network_pre_calc
    network_regional_mask_max_color_codes network_show_meta network_weights no_half_vae no_preview
    noise_offset_prob noise_offset_range opt_channels_last original_height original_height_negative
    original_width original_width_negative outdir prompt prompter_module_args pyramid_noise_discount_range
    pyramid_noise_prob sampler scale sdpa sdxl seed sequential_file_name shuffle_prompts steps strength
    textual_inversion_embeddings tokenizer_cache_dir use_original_file_name v1 v2 v_parameterization vae
    vae_batch_size vae_slices xformers zero_terminal_snr
"""
"""options of the scripts of this name that people know"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, TinySd]:
    return {kind: build_tiny_sd(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def arguments(model: TinySd, outdir: Path, *more: str) -> list[str]:
    flags = {"sd1": [], "sd2": ["--v2"], "sdxl": ["--sdxl"]}[model.kind]
    base = [
        f"--ckpt={model.model}",
        f"--clip_tokenizer={model.tokenizer}",
        f"--outdir={outdir}",
        "--W=64",
        "--H=64",
        "--steps=3",
        *flags,
    ]
    return [*base, *more]


def made(model: TinySd, outdir: Path, *more: str) -> list[Path]:
    return unet_inference.run(arguments(model, outdir, *more))


def pixels(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def distance(first: Path, second: Path) -> int:
    """Largest difference of two pictures in steps of 1/255."""
    return int(abs(pixels(first) - pixels(second)).max())


@pytest.fixture(scope="module")
def network(tiny, tmp_path_factory) -> dict[str, Path]:
    """A LoRA with weights that show, for the denoiser and the text encoder of each model."""
    from library.sd_utils import load_text_encoder_sd, load_unet_sd
    from networks import lora_sd

    generator, paths = torch.Generator().manual_seed(4), {}
    unet = load_unet_sd(tiny["sd1"].model, torch.float32, "cpu")
    encoder = load_text_encoder_sd(tiny["sd1"].model, False, torch.float32, "cpu")
    created = lora_sd.create_network(1.0, 2, 2.0, None, [encoder], unet)
    tensors = {}
    for module in created.loras:
        for name, tensor in module.state_dict().items():
            value = tensor if name == "alpha" else 0.3 * torch.randn(tensor.shape, generator=generator)
            tensors[f"{module.lora_name}.{name}"] = value
    for copy in ("a", "b"):
        path = tmp_path_factory.mktemp("network") / f"{copy}.safetensors"
        scale = 1.0 if copy == "a" else -0.7
        save_file_atomic(
            {k: (v if k.endswith("alpha") else v * scale).contiguous() for k, v in tensors.items()},
            path,
            {"ss_note": copy},
        )
        paths[copy] = path
    return paths


def with_networks(network: dict[str, Path], names: str = "a", *more: str) -> list[str]:
    return [
        "--network_module",
        *["networks.lora"] * len(names),
        "--network_weights",
        *[str(network[n]) for n in names],
        *more,
    ]


# -- text to image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_writes_the_same_bytes(tiny, tmp_path, kind):
    [first] = made(tiny[kind], tmp_path / "a", "--prompt", "a cat --d 5 --f cat.png")
    [second] = made(tiny[kind], tmp_path / "b", "--prompt", "a cat --d 5 --f cat.png")
    [other] = made(tiny[kind], tmp_path / "c", "--prompt", "a cat --d 6 --f cat.png")
    assert first.name == "cat.png" and first.read_bytes() == second.read_bytes()
    assert distance(first, other) > 0
    assert Image.open(first).size == (64, 64)


def test_a_script_runs_on_its_own(tiny, tmp_path):
    """The other script does in `test_names_and_prompts_under_a_locale_of_plain_letters`."""
    given = [word for word in arguments(tiny["sdxl"], tmp_path / "out", "--prompt", "a cat") if word != "--sdxl"]
    done = subprocess.run([sys.executable, ROOT / "sdxl_gen_img.py", *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("im_*_000_*.png"))) == 1


def test_an_error_is_one_message_without_traceback(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "gen_img.py", "--ckpt", "nothing.safetensors"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--ckpt is nothing.safetensors" in done.stderr and "there is no prompt" in done.stderr


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_each_sampler_makes_a_picture_that_does_not_depend_on_its_batch(tiny, tmp_path, sampler):
    options = [
        "--prompt",
        "a cat --d 1,2,3",
        "--images_per_prompt=3",
        f"--sampler={sampler}",
        "--sequential_file_name",
        "--steps=5",
    ]
    alone = made(tiny["sd1"], tmp_path / "alone", *options)
    together = made(tiny["sd1"], tmp_path / "together", *options, "--batch_size=3")
    assert [path.name for path in together] == ["im_000001.png", "im_000002.png", "im_000003.png"]
    assert max(distance(a, b) for a, b in zip(alone, together)) <= 1
    assert distance(together[0], together[1]) > 1


def test_a_single_picture_takes_the_seed_itself_and_several_draw_theirs(tiny, tmp_path):
    [alone] = made(tiny["sd1"], tmp_path / "a", "--prompt", "a cat", "--seed=7")
    assert alone.name.endswith("_000_7.png")
    drawn = [
        p.stem.split("_")[-1]
        for p in made(
            tiny["sd1"], tmp_path / "b", "--prompt", "a cat", "--seed=7", "--images_per_prompt=2", "--steps=1"
        )
    ]
    again = [
        p.stem.split("_")[-1]
        for p in made(
            tiny["sd1"], tmp_path / "c", "--prompt", "a cat", "--seed=7", "--images_per_prompt=2", "--steps=1"
        )
    ]
    assert drawn == again and len(set(drawn)) == 2 and "7" not in drawn


def test_a_file_of_prompts_with_options_rounds_and_texts_in_the_pictures(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "# comment\n\na cat --w 64 --h 96 --s 2 --d 3 --l 4 --n dog\na {e$$red|blue} car --d 9\n", encoding="utf-8"
    )
    paths = made(
        tiny["sdxl"],
        tmp_path / "out",
        "--from_file",
        str(prompts),
        "--n_iter=2",
        "--batch_size=4",
        "--sequential_file_name",
    )
    assert len(paths) == 6
    assert Image.open(paths[0]).size == (64, 96)
    texts = Image.open(paths[0]).text
    assert texts["prompt"] == "a cat" and texts["seed"] == "3" and texts["steps"] == "2" and texts["scale"] == "4.0"
    assert texts["negative-prompt"] == "dog" and texts["original-height"] == "96" and texts["crop-top"] == "0"
    assert [Image.open(path).text["prompt"] for path in paths[1:3]] == ["a red car", "a blue car"]
    assert {Image.open(path).text["seed"] for path in paths[1:3]} == {"9"}


def test_wrong_lines_are_told_together_with_their_numbers(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --zz 3\na dog --w many\na {3$$a|b}\nfine --am 1\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        made(tiny["sd1"], tmp_path, "--from_file", str(prompts))
    for number, part in ((1, "--zz"), (2, "--w is 'many'"), (3, "asks for 3 of 2"), (4, "there are no networks")):
        assert any(f"prompts.txt line {number}" in problem and part in problem for problem in caught.value.problems), (
            number,
            caught.value,
        )


def test_refused_options_say_why(tiny, tmp_path):
    with pytest.raises(ConfigError, match="--clip_vision_strength .*CLIP or VGG"):
        made(tiny["sd1"], tmp_path, "--prompt", "a", "--clip_vision_strength=0.5")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="--outdir is .*file; files cannot be written there"):
        made(tiny["sd1"], tmp_path / "file", "--prompt", "a")
    with pytest.raises(ConfigError, match="leave --v2 out"):
        made(tiny["sd1"], tmp_path, "--prompt", "a", "--v2")
    with pytest.raises(ConfigError, match="CLIP guidance"):
        made(tiny["sd1"], tmp_path, "--prompt", "a --c b")


def test_options_without_effect_are_told(tiny, tmp_path, caplog):
    with caplog.at_level("INFO"):
        made(
            tiny["sd1"], tmp_path, "--prompt", "a --l 1 --n b", "--steps=1", "--strength=0.5", "--crop_top=8", "--sdpa"
        )
    for part in (
        "--strength has no effect",
        "--crop_top: sizes mean nothing",
        "switches guidance off",
    ):
        assert part in caplog.text, part
    with pytest.raises(ConfigError, match="--interactive has none"):
        made(tiny["sd1"], tmp_path, "--interactive", "--n_iter=2")


def test_typed_prompts(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat --d 3\na cat --zz 3\na dog --d 4\n\n"))
    paths = made(tiny["sd1"], tmp_path, "--interactive", "--no_preview")
    assert [path.stem.split("_")[-1] for path in paths] == ["3", "4"]
    assert "unknown option --zz" in capsys.readouterr().err


def test_a_typed_prompt_is_made_before_the_next_one_is_asked_for(tiny, tmp_path, monkeypatch):
    seen = []

    def answer(_: str) -> str:
        seen.append(len(list(tmp_path.glob("*.png"))))
        return "a cat --d 3" if len(seen) <= 2 else ""

    monkeypatch.setattr("builtins.input", answer)
    made(tiny["sd1"], tmp_path, "--interactive", "--sequential_file_name", "--batch_size=4", "--images_per_prompt=3")
    assert seen == [0, 3, 6]


def test_prompts_of_a_module(tiny, tmp_path):
    module = tmp_path / "prompter.py"
    module.write_text(
        "def get_prompter(options, pipeline, networks):\n    return [options.prompter_module_args + ' --d 3', 'b --d "
        "4']\n"
    )
    paths = made(tiny["sd1"], tmp_path, "--from_module", str(module), "--prompter_module_args", "a word")
    assert [Image.open(path).text["prompt"] for path in paths] == ["a word", "b"]


def test_weights_lengths_and_the_ways_to_normalise(tiny, tmp_path):
    results = {}
    for mode in ("none", "abs", "original"):
        [results[mode]] = made(
            tiny["sd1"], tmp_path / mode, "--prompt", "a (cat:1.5) --d 1", f"--emb_normalize_mode={mode}"
        )
    [plain] = made(tiny["sd1"], tmp_path / "plain", "--prompt", "a cat --d 1")
    assert distance(results["none"], results["abs"]) > 0 and distance(results["abs"], plain) > 0
    long = " ".join(["cat dog"] * 60)
    [cut] = made(tiny["sd1"], tmp_path / "cut", "--prompt", f"{long} --d 1")
    [whole] = made(tiny["sd1"], tmp_path / "whole", "--prompt", f"{long} --d 1", "--max_embeddings_multiples=3")
    assert distance(cut, whole) > 0


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_third_branch(tiny, tmp_path, kind):
    line = "a cat --n a dog --d 1"
    [two] = made(tiny[kind], tmp_path / "two", "--prompt", line)
    [three] = made(tiny[kind], tmp_path / "three", "--prompt", line, "--negative_scale=2")
    [off] = made(tiny[kind], tmp_path / "off", "--prompt", f"{line} --nl none", "--negative_scale=2")
    assert distance(two, three) > 0 and distance(two, off) == 0


def test_sizes_change_pictures_of_sdxl(tiny, tmp_path):
    [plain] = made(tiny["sdxl"], tmp_path / "a", "--prompt", "a cat --d 1")
    [same] = made(tiny["sdxl"], tmp_path / "b", "--prompt", "a cat --d 1 --ow 64 --oh 64")
    [large] = made(tiny["sdxl"], tmp_path / "c", "--prompt", "a cat --d 1 --ow 2048 --oh 2048")
    [negative] = made(tiny["sdxl"], tmp_path / "d", "--prompt", "a cat --d 1 --nw 512 --nh 512")
    assert distance(plain, same) == 0 and distance(plain, large) > 0 and distance(plain, negative) > 0


# -- networks ----------------------------------------------------------------------------------------------------------


def test_networks_hooked_merged_and_calculated_before(tiny, network, tmp_path):
    prompt = ["--prompt", "a cat --d 1"]
    [none] = made(tiny["sd1"], tmp_path / "none", *prompt)
    [zero] = made(tiny["sd1"], tmp_path / "zero", *prompt, *with_networks(network, "a", "--network_mul", "0"))
    [hooked] = made(tiny["sd1"], tmp_path / "hooked", *prompt, *with_networks(network, "ab"))
    [merged] = made(tiny["sd1"], tmp_path / "merged", *prompt, *with_networks(network, "ab", "--network_merge"))
    [partly] = made(
        tiny["sd1"], tmp_path / "partly", *prompt, *with_networks(network, "ab", "--network_merge_n_models", "1")
    )
    [before] = made(tiny["sd1"], tmp_path / "before", *prompt, *with_networks(network, "ab", "--network_pre_calc"))
    assert distance(none, zero) == 0
    assert distance(none, hooked) > 3
    assert max(distance(hooked, other) for other in (merged, partly, before)) <= 1


@pytest.mark.parametrize("how", [[], ["--network_pre_calc"]])
def test_multipliers_of_a_line_hold_for_that_line(tiny, network, tmp_path, how):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a cat --d 1\na cat --d 1 --am 0,0\na cat --d 1 --am 0.5,1\na cat --d 1 --am 0,0\n", encoding="utf-8"
    )
    full, first, other, last = made(
        tiny["sd1"], tmp_path / "out", "--from_file", str(prompts), "--batch_size=4", "--sequential_file_name",
        *with_networks(network, "ab", *how)
    )
    [none] = made(tiny["sd1"], tmp_path / "none", "--prompt", "a cat --d 1")
    assert distance(first, none) == distance(last, none) == 0
    assert distance(full, none) > 3 and distance(full, other) > 0


def test_counts_of_networks_are_checked(tiny, network, tmp_path):
    with pytest.raises(ConfigError, match="--network_mul has 2 values for 1 files"):
        made(tiny["sd1"], tmp_path, "--prompt", "a", *with_networks(network, "a", "--network_mul", "1", "2"))
    with pytest.raises(ConfigError, match="has 1 multipliers .* for 2 networks"):
        made(tiny["sd1"], tmp_path, "--prompt", "a --am 1", *with_networks(network, "ab"))
    with pytest.raises(ConfigError, match="--am changes a network that is merged"):
        made(tiny["sd1"], tmp_path, "--prompt", "a --am 0.5", *with_networks(network, "a", "--network_merge"))
    with pytest.raises(ConfigError, match="needed: a LoRA-type adapter"):
        made(
            tiny["sd1"],
            tmp_path,
            "--prompt",
            "a",
            "--network_module",
            "networks.lora",
            "--network_weights",
            str(tiny["sd1"].model),
        )


def test_networks_of_another_package(tiny, tmp_path):
    pytest.importorskip("lycoris")
    whole = write_adapter(tmp_path / "whole.safetensors", 4)
    path = tmp_path / "denoiser.safetensors"
    save_file_atomic({k: t for k, t in load_safetensors(whole, "cpu").items() if k.startswith("lora_unet")}, path)
    prompt, file = ["--prompt", "a cat --d 1"], ["--network_weights", str(path), "--network_mul", "0.7"]
    [ours] = made(tiny["sdxl"], tmp_path / "ours", *prompt, *file, "--network_module", "lora")
    [theirs] = made(tiny["sdxl"], tmp_path / "theirs", *prompt, *file, "--network_module", "lycoris.kohya")
    assert distance(ours, theirs) <= 1
    with pytest.raises(ConfigError, match="cannot take a network out"):
        made(tiny["sdxl"], tmp_path, *prompt, *file, "--network_module", "lycoris.kohya", "--network_pre_calc")


def test_a_module_of_another_package_that_raises_is_one_message(tiny, network, tmp_path, monkeypatch):
    (tmp_path / "raising_network.py").write_text(
        "def create_network_from_weights(*args, **kwargs):\n    raise KeyError('no such preset')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"raising_network makes no network of it with kind=odd \(KeyError: 'no such preset'\)"
    ):
        made(
            tiny["sd1"],
            tmp_path / "out",
            "--prompt",
            "a",
            "--network_module",
            "raising_network",
            "--network_weights",
            str(network["a"]),
            "--network_args",
            "kind=odd",
        )


def test_layers_and_blocks_that_the_model_has_not_are_told_before_it_is_loaded(tiny, tmp_path):
    with pytest.raises(ConfigError, match="--clip_skip is 13; .* has 2 layers in use, so 1 to 2 is needed"):
        made(tiny["sd1"], tmp_path, "--prompt", "a", "--clip_skip=13")
    for words in (["--prompt", "a", "--ds_depth_1=8"], ["--prompt", "a --dsd1 2 --dsd2 99"]):
        with pytest.raises(ConfigError, match="Deep Shrink is for block .* on the way down"):
            made(tiny["sd1"], tmp_path, *words)


def test_one_bad_line_does_not_end_the_run(tiny, tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --d -1\na dog --zz 4\na -- b --d 3\n", encoding="utf-8")
    pictures = made(tiny["sd1"], tmp_path / "out", "--from_file", str(file), "--steps=1", "--seed=-1")
    assert len(pictures) == 2 and "prompts.txt line 2: unknown option --zz" in caplog.text and "left out" in caplog.text
    texts = [Image.open(picture).info["prompt"] for picture in pictures]
    assert texts == ["a cat", "a -- b"]


def test_what_is_wrong_with_one_picture_of_a_batch_does_not_end_the_run(tiny, tmp_path, monkeypatch, caplog):
    from library.generation.gen_img.batches import PictureBatches

    file, generate, sizes = tmp_path / "prompts.txt", PictureBatches.generate, []
    file.write_text("a cat\na broken dog\na cow\na sheep\n")

    def failing(self, batch):
        sizes.append(len(batch))
        if any("broken" in request.prompt for request in batch):
            raise ConfigError("it is broken")
        return generate(self, batch)

    plain = made(tiny["sd1"], tmp_path / "plain", "--from_file", str(file), "--steps=1", "--seed=3", "--batch_size=3")
    monkeypatch.setattr(PictureBatches, "generate", failing)
    with pytest.raises(AtelierError, match="1 of 4 pictures could not be made"):
        made(tiny["sd1"], tmp_path / "out", "--from_file", str(file), "--steps=1", "--seed=3", "--batch_size=3")
    assert sizes == [3, 1, 1, 1, 1] and "picture 1: it is broken" in caplog.text
    files = sorted((tmp_path / "out").iterdir())
    wanted = [path for path in plain if "_001_" not in path.name]
    assert [path.name.split("_")[2:] for path in files] == [path.name.split("_")[2:] for path in wanted]
    assert all(numpy.abs(pixels(path) - pixels(other)).max() <= 1 for path, other in zip(files, wanted))


def test_a_drawn_choice_that_cannot_be_made_does_not_end_the_run(tiny, tmp_path, caplog):
    argv = ["--prompt=a {cat --w 3|cat}", "--images_per_prompt=6", "--steps=1", "--seed=8"]
    with pytest.raises(AtelierError, match="pictures could not be made"):
        made(tiny["sd1"], tmp_path / "out", *argv)
    assert list((tmp_path / "out").iterdir()) and "--prompt" in caplog.text


def test_prompts_in_the_bytes_of_another_locale(tiny, tmp_path, monkeypatch, capsys):
    """Under LC_ALL=C the letters of a prompt come as single bytes."""
    carried = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    picture = made(tiny["sd1"], tmp_path / "out", f"--prompt={carried}", "--steps=1")[0]
    assert Image.open(picture).text["prompt"] == "caf\u00e9"
    with pytest.raises(ConfigError, match=r"--prompt is not UTF-8 text \(caf.udce9\)"):
        made(tiny["sd1"], tmp_path / "out", "--prompt=caf\udce9", "--steps=1")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"caf\udce9\n{carried}\n\n"))
    picture = made(tiny["sd1"], tmp_path / "typed", "--interactive", "--steps=1")[0]
    assert Image.open(picture).text["prompt"] == "caf\u00e9" and "is not UTF-8" in capsys.readouterr().err


def test_names_and_prompts_under_a_locale_of_plain_letters(tiny, tmp_path):
    """LC_ALL=C without Python's own ways around it; the name of the prompts is UTF-8, that of the folder is not. A
    prompt in the command line is tested above."""
    prompts = os.fsencode(tmp_path) + b"/\xc3\xbc.txt"
    with open(prompts, "wb") as file:
        file.write("caf\u00e9 --d 3\n".encode())
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = os.fsencode(tmp_path) + b"/caf\xe9"
    words = [os.fsencode(word) for word in arguments(tiny["sd1"], tmp_path / "out", "--steps=1")]
    argv = [os.fsencode(sys.executable), b"gen_img.py", *words, b"--outdir=" + out, b"--from_file=" + prompts]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    (name,) = os.listdir(out)
    assert Image.open(out + b"/" + name).text["prompt"] == "caf\u00e9"


def test_metadata_of_networks_is_shown(tiny, network, tmp_path, capsys):
    made(tiny["sd1"], tmp_path, "--prompt", "a", "--steps=1", *with_networks(network, "b", "--network_show_meta"))
    assert '"ss_note": "b"' in capsys.readouterr().out


def test_regions_of_a_mask(tiny, network, tmp_path):
    """Left half the first prompt and network, right half the second: with one prompt everywhere and no network, it is
    that."""
    mask = tmp_path / "mask.png"
    values = numpy.zeros((64, 64, 3), dtype=numpy.uint8)
    values[:, :32, 0], values[:, 32:, 1] = 255, 255
    Image.fromarray(values).save(mask)
    region = ["--mask_path", str(mask)]
    [plain] = made(tiny["sd1"], tmp_path / "plain", "--prompt", "a cat --d 1")
    [same] = made(tiny["sd1"], tmp_path / "same", "--prompt", "a cat AND a cat --d 1", *region)
    [two] = made(tiny["sd1"], tmp_path / "two", "--prompt", "a cat AND a dog --d 1", *region)
    [codes] = made(
        tiny["sd1"],
        tmp_path / "codes",
        "--prompt",
        "a cat AND a dog --d 1",
        *region,
        "--network_regional_mask_max_color_codes=2",
    )
    [networks] = made(
        tiny["sd1"], tmp_path / "net", "--prompt", "a cat AND a dog --d 1", *region, *with_networks(network, "ab")
    )
    assert distance(plain, same) <= 1 and distance(plain, two) > 0
    assert distance(two, codes) == 0 and distance(two, networks) > 3
    values[...] = (255, 0, 0)
    Image.fromarray(values).save(mask)
    [first] = made(
        tiny["sd1"], tmp_path / "first", "--prompt", "a cat AND a dog --d 1", *region, *with_networks(network, "ab")
    )
    [alone] = made(tiny["sd1"], tmp_path / "alone", "--prompt", "a cat --d 1", *with_networks(network, "a"))
    assert distance(first, alone) <= 1


def test_textual_inversions(tiny, tmp_path):
    """Two vectors that are those of known words make the same picture as the words."""
    from library.components.tokenizers import load_clip_tokenizer
    from library.sd_utils import load_text_encoder_sd

    for kind in ("sd1",):
        table = load_text_encoder_sd(
            tiny[kind].model, False, torch.float32, "cpu"
        ).text_model.embeddings.token_embedding.weight
        ids = load_clip_tokenizer(str(tiny[kind].tokenizer))("cat dog", add_special_tokens=False).input_ids
        path = tmp_path / "myword.safetensors"
        save_file_atomic({"emb_params": table[ids].detach().contiguous()}, path)
        [words] = made(tiny[kind], tmp_path / "a", "--prompt", "a cat dog here --d 1")
        [inverted] = made(
            tiny[kind], tmp_path / "b", "--prompt", "a myword here --d 1", "--textual_inversion_embeddings", str(path)
        )
        [without] = made(tiny[kind], tmp_path / "c", "--prompt", "a myword here --d 1")
        assert distance(words, inverted) == 0 and distance(words, without) > 0
    with pytest.raises(ConfigError, match="clip_l and clip_g are needed"):
        made(tiny["sdxl"], tmp_path, "--prompt", "a", "--textual_inversion_embeddings", str(path))


# -- pictures to pictures ----------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path) -> Path:
    generator = numpy.random.default_rng(1)
    path = tmp_path / "source.png"
    Image.fromarray(numpy.kron(generator.integers(0, 255, (8, 8, 3)), numpy.ones((8, 8, 1))).astype(numpy.uint8)).save(
        path
    )
    return path


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "pndm", "dpmsolver++", "dpmsingle"])
def test_strength_goes_from_the_source_to_a_new_picture(tiny, tmp_path, source, sampler):
    def at(strength: float) -> Path:
        options = [
            "--prompt",
            f"a cat --d 1 --t {strength}",
            "--image_path",
            str(source),
            f"--sampler={sampler}",
            "--steps=10",
        ]
        return made(tiny["sd1"], tmp_path / f"{sampler}{strength}", *options)[0]

    kept, little, much = at(0), at(0.3), at(0.9)
    near, far = abs(pixels(kept) - pixels(little)).mean(), abs(pixels(kept) - pixels(much)).mean()
    assert 0 < near < far


def test_pictures_take_the_size_of_their_source_and_names(tiny, tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    for name, size in (("one", (100, 70)), ("two", (64, 64))):
        Image.new("RGB", size, (9, 99, 199)).save(folder / f"{name}.png")
    given = [a for a in arguments(tiny["sd1"], tmp_path / "out") if not a.startswith(("--W", "--H"))]
    options = [
        "--prompt",
        "a cat",
        "--image_path",
        str(folder),
        "--use_original_file_name",
        "--images_per_prompt=2",
        "--batch_size=2",
    ]
    paths = unet_inference.run([*given, *options])
    assert [(path.name, Image.open(path).size) for path in paths] == [("one.png", (96, 64)), ("two.png", (64, 64))]


@pytest.mark.parametrize("sampler", ["ddim", "lms", "heun", "dpm_2_a", "pndm", "dpmsolver"])
def test_inpainting_keeps_what_the_mask_leaves(tiny, tmp_path, source, sampler):
    values = numpy.zeros((64, 64), dtype=numpy.uint8)
    values[:, 32:] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    latents = []
    from library.generation.gen_img import batches

    real = batches.PictureBatches._decoded

    def watched(self, given):
        latents.append((given, self._encoded(self.sources, (64, 64))))
        return real(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.PictureBatches, "_decoded", watched)
        made(
            tiny["sd1"], tmp_path, "--prompt", "a cat --d 1", "--image_path", str(source), "--mask_path",
            str(tmp_path / "mask.png"),
            f"--sampler={sampler}", "--strength=0.9", "--steps=6",
        )  # fmt: skip
    [(result, kept)] = latents
    torch.testing.assert_close(result[..., :3], kept[..., :3])
    assert (result[..., 5:] - kept[..., 5:]).abs().min() > 0


def test_a_picture_gives_its_prompt(tiny, tmp_path):
    [first] = made(tiny["sd1"], tmp_path / "a", "--prompt", "a \\{cat\\} --n dog --d 1")
    [second] = made(tiny["sd1"], tmp_path / "b", "--image_path", str(first))
    assert Image.open(second).text["prompt"] == "a {cat}" and Image.open(second).text["negative-prompt"] == "dog"
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    with pytest.raises(ConfigError, match="holds none either"):
        made(tiny["sd1"], tmp_path, "--image_path", str(tmp_path / "plain.png"))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_highres_fix_in_its_ways(tiny, tmp_path, kind):
    options = [
        "--prompt",
        "a cat --d 1",
        "--W=128",
        "--H=128",
        "--highres_fix_scale=0.5",
        "--highres_fix_steps=2",
        "--sequential_file_name",
    ]
    small, plain = made(tiny[kind], tmp_path / "a", *options, "--highres_fix_save_1st")
    assert (small.name, plain.name) == ("im_0000001.png", "im_1000001.png")
    assert Image.open(small).size == (64, 64) and Image.open(plain).size == (128, 128)
    [alone] = made(tiny[kind], tmp_path / "alone", "--prompt", "a cat --d 1 --s 2")
    assert distance(small, alone) == 0
    [latents] = made(tiny[kind], tmp_path / "b", *options, "--highres_fix_latents_upscaling")
    assert distance(plain, latents) > 0


def test_an_upscaler_module(tiny, tmp_path, monkeypatch):
    (tmp_path / "my_upscaler.py").write_text(
        "class Upscaler:\n    def __init__(self, factor):\n        self.factor = factor\n"
        "    def upscale(self, vae, images, latents, dtype, width, height, batch_size=1, vae_batch_size=1):\n"
        "        assert self.factor == 2\n        return [image.resize((width, height)) for image in images]\n"
        "def create_upscaler(**arguments):\n    return Upscaler(**arguments)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--prompt", "a cat --d 1", "--W=128", "--H=128", "--highres_fix_scale=0.5", "--highres_fix_steps=2"]
    [path] = made(
        tiny["sd1"], tmp_path, *options, "--highres_fix_upscaler=my_upscaler", "--highres_fix_upscaler_args=factor=2"
    )
    assert Image.open(path).size == (128, 128)


@pytest.mark.parametrize(
    ("kind", "depth"), [("sd1", 0), ("sd1", 1), ("sdxl", 0), ("sdxl", 1), ("sdxl", 2), ("sdxl", 3)]
)
def test_deep_shrink_changes_the_picture_while_timesteps_are_high(tiny, tmp_path, kind, depth):
    [plain] = made(tiny[kind], tmp_path / "a", "--prompt", "a cat --d 1")
    [shrunk] = made(tiny[kind], tmp_path / "b", "--prompt", "a cat --d 1", f"--ds_depth_1={depth}")
    [never] = made(tiny[kind], tmp_path / "c", "--prompt", f"a cat --d 1 --dsd1 {depth} --dst1 1000")
    assert distance(plain, shrunk) > 0 and distance(plain, never) == 0


def test_gradual_latent(tiny, tmp_path):
    size = [
        "--W=128",
        "--H=128",
        "--sampler=euler_a",
        "--steps=12",
        "--gradual_latent_timesteps=750",
        "--gradual_latent_ratio_step=0.25",
    ]
    [plain] = made(tiny["sd1"], tmp_path / "a", "--prompt", "a cat --d 1", *size)
    [sharp] = made(
        tiny["sd1"], tmp_path / "b", "--prompt", "a cat --d 1", *size, "--gradual_latent_unsharp_params=3,0.5,0.5,1"
    )
    assert Image.open(plain).size == (128, 128) and distance(plain, sharp) > 0
    with pytest.raises(ConfigError, match="works with --sampler euler_a"):
        made(tiny["sd1"], tmp_path, "--prompt", "a", "--gradual_latent_timesteps=700")
    with pytest.raises(ConfigError, match="gradual latent ends at"):
        made(tiny["sd1"], tmp_path, "--prompt", "a", *size, "--steps=2")


def test_noise_of_other_kinds(tiny, tmp_path):
    [plain] = made(tiny["sd1"], tmp_path / "a", "--prompt", "a cat --d 1")
    [pyramid] = made(tiny["sd1"], tmp_path / "b", "--prompt", "a cat --d 1", "--pyramid_noise_prob=1")
    [offset] = made(
        tiny["sd1"],
        tmp_path / "c",
        "--prompt",
        "a cat --d 1",
        "--noise_offset_prob=1",
        "--noise_offset_range",
        "0.1",
        "0.1",
    )
    assert distance(plain, pyramid) > 0 and distance(plain, offset) > 0


def test_every_known_option_is_there():
    ours = {option for action in unet_inference.build_parser()._actions for option in action.option_strings}
    assert not [name for name in KNOWN_OPTIONS.split() if f"--{name}" not in ours]


def test_models_that_do_not_fit_are_told_before_anything_is_loaded(tiny, tmp_path):
    sd1, sdxl = tiny["sd1"], tiny["sdxl"]
    with pytest.raises(ConfigError) as caught:
        made(sd1, tmp_path, "--prompt", "a", "--sdxl", f"--vae={tmp_path / 'missing.safetensors'}")
    assert "--ckpt" in str(caught.value) and "an SDXL checkpoint" in str(caught.value)
    with pytest.raises(ConfigError, match="--vae is .*missing.safetensors"):
        made(sd1, tmp_path, "--prompt", "a", f"--vae={tmp_path / 'missing.safetensors'}")
    with pytest.raises(ConfigError, match="--clip_tokenizer"):
        made(sdxl, tmp_path, "--prompt", "a", f"--clip_tokenizer={tmp_path}")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_half_precision_is_near(tiny, tmp_path, kind):
    [full] = made(tiny[kind], tmp_path / "a", "--prompt", "a cat --d 1")
    [half] = made(tiny[kind], tmp_path / "b", "--prompt", "a cat --d 1", "--bf16")
    [vae] = made(
        tiny[kind],
        tmp_path / "c",
        "--prompt",
        "a cat --d 1",
        "--bf16",
        "--no_half_vae",
        "--opt_channels_last",
        "--vae_batch_size=0.5",
    )
    assert 0 < abs(pixels(full) - pixels(half)).mean() < 8 and abs(pixels(full) - pixels(vae)).mean() < 8


def test_the_minimal_script_and_this_one_make_one_picture(tiny, tmp_path):
    from library.generation import sdxl_inference

    [ours] = made(tiny["sdxl"], tmp_path / "a", "--prompt", "a cat --d 1 --l 6 --n dog", "--sampler=euler")
    [other] = sdxl_inference.run(
        [
            f"--ckpt_path={tiny['sdxl'].model}", f"--clip_tokenizer={tiny['sdxl'].tokenizer}",
            f"--output_dir={tmp_path / 'b'}", "--prompt=a cat",
            "--negative_prompt=dog", "--seed=1", "--width=64", "--height=64", "--steps=3", "--cfg_scale=6",
            "--dtype=float32",
        ]
    )  # fmt: skip
    assert distance(ours, other) <= 1


def test_pictures_that_two_calls_make_in_one_second_stay_apart(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unet_inference.time, "strftime", lambda _: "20260102030405")
    for _ in range(2):
        unet_inference.run(arguments(tiny["sd1"], tmp_path, "--prompt=a cat", "--seed=5", "--steps=1"))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "im_20260102030405_000_5.png", "im_20260102030405_000_5_2.png",
    ]  # fmt: skip

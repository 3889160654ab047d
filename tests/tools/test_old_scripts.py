"""Every old script of the folder networks runs with its old options on a tiny model, and does what the tool does."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from library.safetensors_utils import load_safetensors
from tests.tools.test_extract_lora import moved
from tests.tools.test_merge_lora import build, models_of, write_lora
from tests.waiting import PATIENCE
from tools.lora_tools.old_scripts import SCRIPTS, translated

ROOT = Path(__file__).resolve().parents[2]
SUM = ["--models", "{lora}", "{other}", "--ratios", "0.5", "0.5", "--save_to", "{out}"]
CASES = [
    ("resize_lora", "sd1", ["--model", "{lora}", "--save_to", "{out}", "--save_precision", "fp16", "--new_rank", "1", "--device", "cpu", "--verbose"]),
    ("resize_lora", "sd1", ["--model", "{lora}", "--save_to", "{out}", "--new_rank", "2", "--dynamic_method", "sv_ratio", "--dynamic_param", "5"]),
    ("extract_lora_from_models", "sd2", ["--v2", "--v_parameterization", "--model_org", "{model}", "--model_tuned", "{tuned}", "--save_to", "{out}",
                                         "--load_precision", "fp16", "--dim", "3", "--conv_dim", "2",
                                         "--clamp_quantile", "0.9", "--min_diff", "0.001"]),
    ("extract_lora_from_models", "sdxl", ["--sdxl", "--model_org", "{model}", "--model_tuned", "{tuned}", "--save_to", "{out}",
                                          "--load_original_model_to=cpu", "--load_tuned_model_to", "cpu",
                                          "--save_precision", "bf16", "--no_metadata"]),
    ("flux_extract_lora", "flux", ["--model_org", "{model}", "--model_tuned", "{tuned}", "--save_to", "{out}", "--mem_eff_safe_open", "--dim", "2",
                                   "--device", "cpu", "--save_precision", "bf16"]),
    ("extract_lora_from_dylora", "sd1", ["--model", "{lora}", "--save_to", "{out}", "--unit", "1"]),
    ("check_lora_weights", "sd1", ["{lora}"]), ("check_lora_weights", "sd1", ["{lora}", "-s"]),
    ("check_lora_weights", "sd1", ["{lora}", "--show_all_keys"]),
    ("merge_lora", "sd1", SUM),
    ("merge_lora", "sd1", [*SUM, "--concat", "--shuffle", "--precision", "float", "--save_precision", "fp16", "--no_metadata"]),
    ("merge_lora", "sd2", ["--v2", "--sd_model", "{model}", "--models", "{lora}", "--ratios", "1", "--save_to", "{out}", "--precision", "fp16"]),
    ("merge_lora_old", "sd1", ["--sd_model", "{model}", "--models", "{lora}", "--ratios", "1", "--save_to", "{out}", "--save_precision", "fp16"]),
    ("sdxl_merge_lora", "sdxl", ["--sd_model", "{model}", "--models", "{lora}", "--ratios", "1", "--save_to", "{out}"]),
    ("sdxl_merge_lora", "sdxl", [*SUM, "--lbws", str([1.0] * 12), str([0.5] * 12)]),
    ("flux_merge_lora", "flux", ["--flux_model", "{model}", "--models", "{lora}", "--ratios", "1", "--save_to", "{out}", "--loading_device", "cpu",
                                 "--working_device", "cpu", "--mem_eff_load_save", "--diffusers", "--save_precision",
                                 "bf16"]),
    ("svd_merge_lora", "sd1", [*SUM, "--new_rank", "2", "--new_conv_rank", "1", "--device", "cpu", "--precision", "float"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """family -> the files that the commands name."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = str(build(family, folder))
            loras = [write_lora(folder / f"{i}.safetensors", *models_of(family, model), seed=i) for i in (0, 1)]
            tuned = str(folder / "tuned.safetensors")
            moved(model, tuned, lambda key, tensor: tensor.ndim > 1 and "first_stage" not in key)
            made[family] = {
                "model": model,
                "lora": loras[0],
                "other": loras[1],
                "tuned": tuned,
                "out": str(folder / "out.safetensors"),
            }
        return made[family]

    return of


def test_every_old_name_is_tried():
    assert {name for name, _, _ in CASES} == set(SCRIPTS)


@pytest.mark.parametrize(("name", "family", "words"), CASES)
def test_old_options_run(places, name, family, words, caplog):
    files = places(family)
    out = Path(files["out"])
    out.unlink(missing_ok=True)
    argv = [word.format(**files) if "{" in word else word for word in words]
    assert importlib.import_module(f"networks.{name}").main(argv) == 0
    assert sum("is now tools/" in record.getMessage() for record in caplog.records) == 1
    if name == "extract_lora_from_dylora":
        out = out.with_name("out-0001.safetensors")
    if "{out}" in words:
        assert load_safetensors(out)
        assert importlib.import_module(f"networks.{name}").main(argv) == 0  # old scripts write over their output


def test_words_in_place_of_others():
    assert translated("flux_merge_lora", ["--loading_device", "cpu", "--working_device=cuda", "--ratios", "-1", "--diffusers", "--save_to", "x"]) == [
        "--device", "cuda", "--ratios", "-1", "--save_to", "x", "--overwrite", "--family", "flux",
    ]  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_as_a_script(name):
    words = [sys.executable, str(ROOT / "networks" / f"{name}.py"), "--help"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0 and "--save_to" in result.stdout or "--plot" in result.stdout, result.stderr

"""Trainers to derive from: what nobody overrides changes no byte, what is overridden is really called, and a script
trains."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError
from library.safetensors_utils import read_header
from tests.runs.conftest import read_parts
from tests.runs.families import Tinies
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "sd": ("train_network", "NetworkTrainer"), "sdxl": ("sdxl_train_network", "SdxlNetworkTrainer"),
    "flux": ("flux_train_network", "FluxNetworkTrainer"), "anima": ("anima_train_network", "AnimaNetworkTrainer"),
    "sd3": ("sd3_train_network", "Sd3NetworkTrainer"),
    "lumina": ("lumina_train_network", "LuminaNetworkTrainer"),
    "hunyuan_image": ("hunyuan_image_train_network", "HunyuanImageNetworkTrainer"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


def trainer_class(family: str) -> type:
    module, name = SCRIPTS[family]
    return getattr(importlib.import_module(module), name)


def train(trainer, work, out: str, *more: str) -> Path:
    parser = importlib.import_module(SCRIPTS[work.family][0]).setup_parser()
    trainer.train(parser.parse_args([*work.argv(out, "--max_train_steps=2"), *more]))
    return work.folder / out / "lora.safetensors"


@pytest.mark.parametrize("family", SCRIPTS)
def test_a_plain_trainer_gives_the_bytes_of_the_script(family, tinies, tmp_path):
    work = tinies.work(family, tmp_path)
    plain = work.train("script", "--max_train_steps=2")
    mine = train(trainer_class(family)(), work, "mine")
    assert read_parts(mine)[1] == read_parts(plain)[1]
    first, second = read_parts(mine)[0], read_parts(plain)[0]
    assert {key for key in first if first[key] != second.get(key)} <= {
        "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date", "sshs_model_hash",
        "sshs_legacy_hash",
    }


@pytest.mark.parametrize("family", SCRIPTS)
def test_overrides_that_only_call_super_change_nothing(family, tinies, tmp_path):
    base, called = trainer_class(family), set()

    class Passing(base):
        pass

    def passing(name):
        own = getattr(base, name)

        def method(self, *args, **kwargs):
            called.add(name)
            return own(self, *args, **kwargs)

        return method

    names = [
        "get_model_version", "assert_extra_args", "load_target_model", "call_unet", "process_batch", "sample_images",
        "compute_loss",
        "get_tokenize_strategy", "get_text_encoding_strategy", "get_latents_caching_strategy",
        "get_text_encoder_outputs_caching_strategy",
        "on_transformer_loaded", "extra_trainable_params", "on_train_start", "on_step_start", "on_post_optimizer_step",
        "on_post_save",
        "extra_metadata", "update_metadata", "extra_step_logs", "post_process_network", "on_before_sample_images",
        "on_after_sample_images",
        "get_noise_scheduler", "get_tokenizers", "encode_images_to_latents", "shift_scale_latents",
        "get_noise_pred_and_target", "post_process_loss", "all_reduce_network", "prepare_unet_with_accelerator",
        "is_train_text_encoder", "get_text_encoders_train_flags", "get_models_for_text_encoding",
        "is_text_encoder_not_needed_for_training", "cast_text_encoder", "cast_vae", "cast_unet",
        "get_sai_model_spec", "generate_step_logs", "step_logging", "epoch_logging",
    ]
    for name in names:
        setattr(Passing, name, passing(name))
    work = tinies.work(family, tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    plain = work.train("script", "--max_train_steps=2")
    mine = train(Passing(), work, "mine", f"--sample_prompts={prompts}", "--sample_every_n_steps=2")
    assert read_parts(mine)[1] == read_parts(plain)[1]
    assert called == set(names)
    assert len(list((tmp_path / "mine" / "sample").glob("lora_0*_00_*.png"))) == 1


class Counting:
    """What an override computes reaches the file."""

    def get_model_version(self, args):
        return "mine"

    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        self.num_images = train_dataset_group.num_train_images
        if args.network_dim == 3:
            raise ConfigError("a rank of 3 is not taken")

    def load_target_model(self, args, weight_dtype, accelerator):
        version, text_encoder, vae, unet = super().load_target_model(args, weight_dtype, accelerator)
        unet.loaded_by = "mine"
        return version, text_encoder, vae, unet

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, **kwargs):
        assert unet.loaded_by == "mine"
        prediction = super().call_unet(
            args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, **kwargs
        )
        return prediction + self.shift

    def process_batch(self, batch, text_encoders, unet, network, *rest, **kwargs):
        loss = super().process_batch(batch, text_encoders, unet, network, *rest, **kwargs)
        self.losses.append(float(loss.detach()))
        return loss * self.factor

    def extra_trainable_params(self, args, accelerator, network, transformer, trainable_params):
        self.extra = torch.nn.Parameter(torch.zeros(2))
        return [*trainable_params, {"params": [self.extra], "lr": 0.1}]

    def extra_metadata(self, args):
        return {"ss_mine": f"{self.num_images} images"}


def test_what_overrides_give_reaches_the_run(tinies, tmp_path):
    work = tinies.work("flux", tmp_path)

    def run(out, shift, factor):
        trainer = type("Mine", (Counting, trainer_class("flux")), {})()
        trainer.shift, trainer.factor, trainer.losses = shift, factor, []
        return trainer, train(trainer, work, out)

    plain, first = run("plain", 0.0, 1.0)
    shifted, second = run("shifted", 1.0, 1.0)
    still, third = run("still", 0.0, 0.0)
    metadata = read_header(first)[1]
    assert (metadata["ss_base_model_version"], metadata["ss_mine"]) == ("mine", "4 images")
    assert len(plain.losses) == 2 and plain.losses[0] != shifted.losses[0]
    bytes_of = [read_parts(path)[1] for path in (first, second, third)]
    assert len(set(bytes_of)) == 3
    with pytest.raises(ConfigError, match="a rank of 3"):
        train(type("Mine", (Counting, trainer_class("flux")), {})(), work, "refused", "--network_dim=3")


def test_wrong_results_are_named(tinies, tmp_path):
    work, base = tinies.work("flux", tmp_path), trainer_class("flux")
    wrong = type("Wrong", (base,), {"process_batch": lambda self, *args, **kwargs: torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"Wrong.process_batch gave a tensor of shape \[2\]"):
        train(wrong(), work, "a")
    wrong = type("Wrong", (base,), {"compute_loss": lambda self, *args: (0.5, {})})
    with pytest.raises(ConfigError, match="Wrong.compute_loss gave a float"):
        train(wrong(), work, "b")
    wrong = type("Wrong", (base,), {"extra_trainable_params": lambda self, *args: []})
    with pytest.raises(ConfigError, match="left out groups"):
        train(wrong(), work, "c")
    with pytest.raises(ConfigError, match="--max_train_steps"):
        train(base(), work, "d", "--max_train_steps=-1")


SCRIPT = '''
import argparse
import torch
from library import train_util
from flux_train_network import FluxNetworkTrainer, setup_parser


class MyTrainer(FluxNetworkTrainer):
    def __init__(self):
        super().__init__()
        self.batches = 0

    def get_model_version(self, args):
        return "notebook"

    def process_batch(self, batch, text_encoders, unet, network, vae, noise_scheduler, vae_dtype, weight_dtype, accelerator, args,
                      text_encoding_strategy, tokenize_strategy, is_train=True, train_text_encoder=True, train_unet=True):
        self.batches += 1
        loss = super().process_batch(
            batch, text_encoders, unet, network, vae, noise_scheduler, vae_dtype, weight_dtype, accelerator, args,
            text_encoding_strategy, tokenize_strategy, is_train, train_text_encoder, train_unet,
        )
        return loss * args.my_weight

    def on_train_end(self):
        pass


if __name__ == "__main__":
    parser = setup_parser()
    parser.add_argument("--my_weight", type=float, default=1.0)
    args = parser.parse_args()
    train_util.verify_command_line_training_args(args)
    args = train_util.read_config_from_file(args, parser)
    trainer = MyTrainer()
    trainer.train(args)
    print("batches", trainer.batches)
'''


def test_a_wrapper_script_trains(tinies, tmp_path):
    work, script = tinies.work("flux", tmp_path), tmp_path / "my_train.py"
    script.write_text(SCRIPT)
    (tmp_path / "run.toml").write_text("my_weight = 0.5\nmax_train_steps = 3\n")
    argv = [word for word in work.argv("out") if not word.startswith("--max_train_steps")]
    done = subprocess.run(
        [sys.executable, str(script), *argv, f"--config_file={tmp_path / 'run.toml'}"], capture_output=True, text=True,
        timeout=PATIENCE, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "batches 3" in done.stdout
    infos, metadata = read_header(tmp_path / "out" / "lora.safetensors")
    assert metadata["ss_base_model_version"] == "notebook" and metadata["ss_steps"] == "3"
    assert any(name.endswith("lora_up.weight") for name in infos)


def test_the_scripts_answer_without_torch():
    code = (
        "import sys, flux_train_network as s; assert 'FluxNetworkTrainer' in dir(s); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""Names of library.train_util: every one can be imported, costs nothing before, and works on a plain namespace."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from library import train_util
from library.core.errors import ConfigError


@pytest.mark.parametrize("name", sorted(train_util.HOMES))
def test_a_name_leads_to_its_home(name):
    assert callable(getattr(train_util, name))


def test_importing_it_is_cheap_and_an_unknown_name_is_an_error():
    code = "import sys, library.train_util as t; assert 'torch' not in sys.modules; assert 'get_optimizer' in dir(t)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError):
        exec("from library.train_util import no_such_name")


def test_names_of_files():
    options = SimpleNamespace(output_name="mine", save_every_n_epochs=1, save_last_n_epochs=2, save_every_n_steps=10, save_last_n_steps=30)
    assert train_util.get_epoch_ckpt_name(options, ".safetensors", 3) == "mine-000003.safetensors"
    assert train_util.get_step_ckpt_name(options, ".pt", 50) == "mine-step00000050.pt"
    assert train_util.get_last_ckpt_name(SimpleNamespace(output_name=None), ".ckpt") == "last.ckpt"
    assert train_util.get_remove_epoch_no(options, 3) == 1
    assert train_util.get_remove_step_no(options, 50) == 10
    assert train_util.get_remove_step_no(SimpleNamespace(save_last_n_steps=None), 50) is None


def test_optimizer_and_schedule_of_a_namespace():
    options = SimpleNamespace(optimizer_type="AdamW", learning_rate=0.1, optimizer_args=["weight_decay=0.5"], max_train_steps=10,
                              lr_scheduler="linear", lr_warmup_steps=0, lr_scheduler_type=None)
    parameter = torch.nn.Parameter(torch.ones(2))
    name, arguments, optimizer = train_util.get_optimizer(options, [parameter])
    assert name.endswith("AdamW") and arguments == "weight_decay=0.5"
    assert not train_util.is_schedulefree_optimizer(optimizer, options)
    train, evaluate = train_util.get_optimizer_train_eval_fn(optimizer, options)
    assert train() is None and evaluate() is None
    schedule = train_util.get_scheduler_fix(options, optimizer, num_processes=2)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(0.05) and schedule.get_last_lr()[0] == pytest.approx(0.0)


def test_prompts_are_dictionaries(tmp_path):
    assert train_util.line_to_prompt_dict("a ball --w 64 --d 3") == {"prompt": "a ball", "width": 64, "seed": 3}
    path = tmp_path / "p.txt"
    path.write_text("a ball --s 4\n# not this\na cube\n")
    assert [p["prompt"] for p in train_util.load_prompts(str(path))] == ["a ball", "a cube"]


def test_types_and_recorded_options():
    options = SimpleNamespace(mixed_precision="bf16", save_precision=None, log_config=True, wandb_api_key="k", output_dir="/x", network_args=["a=1"])
    assert train_util.prepare_dtype(options) == (torch.bfloat16, None)
    recorded = train_util.get_sanitized_config_or_none(options)
    assert recorded["network_args"] == "['a=1']" and not {"wandb_api_key", "output_dir"} & set(recorded)
    assert train_util.get_sanitized_config_or_none(SimpleNamespace(log_config=False)) is None


def parser_with_config():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config_file")
    for add in (train_util.add_sd_models_arguments, train_util.add_optimizer_arguments, train_util.add_training_arguments, train_util.add_dataset_arguments):
        add(parser)
    return parser


def test_arguments_are_added_with_their_defaults():
    options = parser_with_config().parse_args(["--cache_latents"])
    assert (options.max_train_steps, options.caption_extension, options.cache_latents, options.lr_scheduler) == (1600, ".caption", True, "constant")


def test_a_configuration_file_lies_below_the_command_line(tmp_path, monkeypatch):
    path = tmp_path / "c.toml"
    path.write_text('[a]\nmax_train_steps = "20"\nlearning_rate = "1e-4"\ncache_latents = true\noptimizer_args = ["a=1"]\n')
    monkeypatch.setattr(sys, "argv", ["x", "--config_file", str(path), "--learning_rate", "3e-4"])
    parser = parser_with_config()
    options = train_util.read_config_from_file(parser.parse_args(), parser)
    assert (options.max_train_steps, options.learning_rate, options.cache_latents, options.optimizer_args) == (20, 3e-4, True, ["a=1"])
    path.write_text("max_train_step = 20\n")
    with pytest.raises(ConfigError, match="did you mean 'max_train_steps'"):
        train_util.read_config_from_file(parser.parse_args(), parser)

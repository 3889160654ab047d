"""What users write themselves, as in examples/plugins, through the command line: chosen by name and by path, checked at
start, read back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import library
import train
from examples.plugins.biases import BiasTrainable
from library.core.keyed_random import StepDraws
from library.core.options import option
from library.families import registry
from library.safetensors_utils import load_safetensors
from library.training.parser_common import chosen_variant
from library.training.trainables.base import Trainable
from networks.files.network_files import by_module, read_adapter_file
from networks.kinds.registry import MARKS, kind_of, register_kind
from tests.runs.conftest import Work, read_parts
from tests.runs.families import Tinies, refused_run
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
FORMULAS, HIRA = "examples.plugins.formulas", "examples.plugins.hira"
CHOSEN = {
    "--loss_type": "charbonnier", "--loss_weight": "soft_min_snr", "--timestep_sampling": "triangle",
    "--lr_scheduler": "breathing",
}  # fmt: skip
SHORT = ("--max_train_steps=4", "--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs")


@pytest.fixture(scope="module")
def tinies(tmp_path_factory):
    return Tinies(tmp_path_factory)


@pytest.fixture
def hira_file(work: Work) -> Path:
    return work.train("hira", *SHORT, f"--network_module={HIRA}", "--network_alpha=0", "--network_dim=2")


def by_path(option: str) -> str:
    name = CHOSEN[option]
    return f"{option}={FORMULAS}:{'TriangleSampler' if name == 'triangle' else name}"


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_names_and_paths_train_the_same(work: Work) -> None:
    named = work.train(
        "named", *SHORT, f"--plugins={FORMULAS}", *(f"{option}={name}" for option, name in CHOSEN.items())
    )
    paths = work.train("paths", *SHORT, *map(by_path, CHOSEN))
    assert read_parts(named)[1] == read_parts(paths)[1]


@pytest.mark.parametrize("option", CHOSEN)
def test_each_changes_what_is_learned(work: Work, option: str) -> None:
    plain, own = work.train("plain", *SHORT), work.train("own", *SHORT, by_path(option))
    assert read_parts(plain)[1] != read_parts(own)[1]


def test_a_run_with_own_formulas_resumes_as_if_never_stopped(work: Work) -> None:
    words = [
        *SHORT,
        f"--plugins={FORMULAS}",
        *(f"{option}={name}" for option, name in CHOSEN.items()),
        "--save_state",
        "--save_every_n_steps=2",
    ]
    whole = work.train("whole", *words)
    state = next((work.folder / "whole").glob("*step00000002-state"))
    resumed = work.train("resumed", *words, f"--resume={state}")
    assert read_parts(whole)[1] == read_parts(resumed)[1]


def test_everything_wrong_is_told_before_models_are_loaded(work: Work, monkeypatch, capsys) -> None:
    wrong = {
        "--loss_type": f"{FORMULAS}:charboner", "--loss_weight": "no_such_module:weight",
        "--timestep_sampling": f"{FORMULAS}:midpoint",
        "--lr_scheduler": f"{FORMULAS}:soft_min_snr", "--optimizer_type": f"{FORMULAS}:NoClass",
    }  # fmt: skip
    message = refused_run(
        "flux", work.argv("out", *(f"{option}={value}" for option, value in wrong.items())), monkeypatch, capsys
    )
    for told in (
        f"--loss_type is {FORMULAS}:charboner; the module {FORMULAS} has no charboner; did you mean 'charbonnier'",
        "--loss_weight is no_such_module:weight; there is no module no_such_module, neither in the current folder",
        f"--timestep_sampling is {FORMULAS}:midpoint, which is the function midpoint; needed: a class made from TimestepOptions",
        f"--lr_scheduler is {FORMULAS}:soft_min_snr, which cannot be called with (settings): missing a required argument",
        f"{FORMULAS} has no class NoClass",
    ):
        assert told in message


@pytest.mark.parametrize(
    "source, told",
    [
        (
            "def sample(self, shape, draws): raise RuntimeError('no luck')",
            r"fails on a batch of two \(RuntimeError: no luck\)",
        ),
        (
            "def sample(self, shape, draws): return draws.uniform('x') * 1000",
            r"needed: a tensor with sigmas from 0 to 1",
        ),
        ("def sample(self, shape, draws): return 0.5", r"gives float for a batch of two"),
    ],
)
def test_a_timestep_sampler_is_tried_at_start(work: Work, monkeypatch, capsys, source: str, told: str) -> None:
    (work.folder / "users_sampler.py").write_text(f"class Own:\n    def __init__(self, options): pass\n    {source}\n")
    monkeypatch.delitem(sys.modules, "users_sampler", raising=False)
    monkeypatch.syspath_prepend(str(work.folder))
    message = refused_run("flux", work.argv("out", "--timestep_sampling=users_sampler:Own"), monkeypatch, capsys)
    assert __import__("re").search(told, message)


class Steep:
    """Whole timesteps, the larger ones rarely."""

    def __init__(self, options):
        self.high = options.max_timestep or 1000

    def sample(self, latent_shape, draws):
        return (draws.uniform("steep") ** 3 * self.high).floor()


class Sigmas(Steep):
    def sample(self, latent_shape, draws):
        return draws.uniform("steep")


@pytest.mark.parametrize("place", ["line", "file"])
def test_tables_of_noise_levels_take_a_timestep_sampler_by_its_path(
    tinies, tmp_path: Path, monkeypatch, place: str
) -> None:
    from library.training.objective import DdpmObjective

    seen: list[float] = []
    corrupt = DdpmObjective.corrupt

    def watched(self, latents, noise, times, draws):
        seen.extend(times.tolist())
        return corrupt(self, latents, noise, times, draws)

    monkeypatch.setattr(DdpmObjective, "corrupt", watched)
    work, words = tinies.work("sd1", tmp_path), [f"--timestep_sampling={__name__}:Steep"]
    if place == "file":
        (tmp_path / "own.toml").write_text(f'timestep_sampling = "{__name__}:Steep"\n', encoding="utf-8")
        words = [f"--config_file={tmp_path / 'own.toml'}"]
    work.train("out", "--max_train_steps=2", "--max_timestep=500", *words)
    assert len(set(seen)) > 1 and all(0 <= time < 500 and time == int(time) for time in seen)
    seed = int(read_parts(tmp_path / "out" / "lora.safetensors")[0]["ss_seed"])
    wanted = [(float(StepDraws(seed, 0, (i,)).uniform("steep")) ** 3 * 500) // 1 for i in range(len(seen) // 2)]
    assert seen[: len(wanted)] == pytest.approx(wanted, abs=1)


def test_sigmas_are_no_timesteps_of_a_table(tinies, tmp_path: Path, monkeypatch, capsys) -> None:
    work = tinies.work("sd1", tmp_path)
    told = refused_run("sd", work.argv("out", f"--timestep_sampling={__name__}:Sigmas"), monkeypatch, capsys)
    assert "needed: a tensor [2] of whole timesteps from 0 to 999" in told
    told = refused_run("sd", work.argv("out", "--timestep_sampling=sigmoid"), monkeypatch, capsys)
    assert "it is not available here" in told and "a sampler of your own can be given by its path" in told


CALLS = """
import library
from tests.planted.test_variants import RECORD
from tests.runs.test_plugins import Steep

library.TIMESTEP_SAMPLERS.register("steep")(Steep)
library.register_family(RECORD)
"""


def test_what_a_plugin_registers_by_a_call_is_known_to_the_checks(tinies, tmp_path, monkeypatch) -> None:
    """A sampler in a family that takes none of the built-in ones, from the line and from a file; a variant."""
    (tmp_path / "calls_plugin.py").write_text(CALLS)
    monkeypatch.syspath_prepend(str(tmp_path))
    samplers = library.TIMESTEP_SAMPLERS._entries
    families = registry.records()
    monkeypatch.setattr(registry, "_records", dict(families))  # what is registered meanwhile is taken out again
    work = tinies.work("sd1", tmp_path)
    (tmp_path / "own.toml").write_text('plugins = "calls_plugin"\ntimestep_sampling = "steep"\n', encoding="utf-8")
    for words in (["--plugins=calls_plugin", "--timestep_sampling=steep"], [f"--config_file={tmp_path / 'own.toml'}"]):
        monkeypatch.setattr(library.TIMESTEP_SAMPLERS, "_entries", dict(samplers))
        monkeypatch.delitem(sys.modules, "calls_plugin", raising=False)
        work.trainer("out", *words).check()
    argv = ["--plugins", "calls_plugin", "--model_type", "second"]
    monkeypatch.delitem(sys.modules, "calls_plugin")
    monkeypatch.setattr(library.TIMESTEP_SAMPLERS, "_entries", dict(samplers))
    monkeypatch.setattr(registry, "_records", dict(families))
    assert chosen_variant("flux", argv) == "second"


def test_a_path_behind_plugins_is_refused_with_the_right_form(work: Work, monkeypatch, capsys) -> None:
    message = refused_run("flux", work.argv("out", f"--plugins={FORMULAS}:charbonnier"), monkeypatch, capsys)
    told = f"--plugins is {FORMULAS}:charbonnier, a path of one thing; needed: the module, --plugins {FORMULAS}"
    assert told in message


def test_a_plugin_that_cannot_be_imported_ends_the_run(work: Work, monkeypatch, capsys) -> None:
    message = refused_run("flux", work.argv("out", "--plugins=no_such_plugin"), monkeypatch, capsys)
    assert "--plugins is no_such_plugin; there is no module no_such_plugin" in message


def test_a_sampler_makes_samples(tinies, tmp_path: Path, monkeypatch, capsys) -> None:
    pictures = {}
    for sampler in ("euler", f"{FORMULAS}:midpoint"):
        work = tinies.work("sd1", tmp_path)
        (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
        out = sampler.partition(":")[2] or sampler
        work.train(
            out,
            "--max_train_steps=1",
            f"--sample_prompts={tmp_path / 'prompts.txt'}",
            "--sample_at_first",
            f"--sample_sampler={sampler}",
        )
        pictures[out] = [path.read_bytes() for path in sorted((tmp_path / out / "sample").glob("*.png"))]
    assert pictures["midpoint"] and pictures["midpoint"] != pictures["euler"]
    message = refused_run(
        "sd", tinies.work("sd1", tmp_path).argv("x", f"--sample_sampler={FORMULAS}:breathing"), monkeypatch, capsys
    )
    assert (
        f"--sample_sampler is {FORMULAS}:breathing, which cannot be called with (denoise, latents, sigmas, noise)"
        in message
    )


def test_flow_families_take_samplers_that_say_so() -> None:
    from library.core.errors import ConfigError
    from library.training.inference_samplers import INFERENCE_SAMPLERS, check_flow_sampler

    check_flow_sampler(f"{FORMULAS}:midpoint", "--sample_sampler")
    INFERENCE_SAMPLERS.register("only_for_sd")(only_for_sd)
    with pytest.raises(ConfigError, match="a sampler of SD models; flow models have ddim.*register"):
        check_flow_sampler("only_for_sd", "--sample_sampler")


def only_for_sd(denoise, latents, sigmas, noise):
    return latents


# ---- a kind of adapter -----------------------------------------------------------------------------------------------


def test_an_own_kind_is_trained_read_and_trained_on(work: Work, hira_file: Path) -> None:
    tensors = read_adapter_file(hira_file)
    assert {kind_of(part).name for part in by_module(tensors).values()} == {"HiRA"}
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith(".hira_b"))
    with safe_open(hira_file, "pt") as file:
        assert file.metadata()["ss_network_module"] == HIRA
    on = work.train(
        "on", *SHORT, f"--network_module={HIRA}", "--network_alpha=0", f"--network_weights={hira_file}",
        "--dim_from_weights",
        "--max_train_steps=1", "--learning_rate=1e-9",
    )  # fmt: skip
    again = read_adapter_file(on)
    assert all((again[key].float() - tensors[key].float()).abs().max() < 1e-4 for key in tensors)


def test_tools_read_it_with_the_plugin_and_tell_of_it_without(hira_file: Path) -> None:
    words = [sys.executable, "tools/check_lora.py", str(hira_file)]
    without = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (
        without.returncode == 2
        and f"if you trust it, add --plugins {HIRA}" in without.stderr
        and "Traceback" not in without.stderr
    )
    read = subprocess.run([*words, "--plugins", HIRA], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert read.returncode == 0 and "HiRA" in read.stdout, read.stderr


def test_it_is_merged_into_a_checkpoint(work: Work, hira_file: Path) -> None:
    from tools import merge_lora

    model = next(word.partition("=")[2] for word in work.tiny.arguments() if word.startswith("--pretrained"))
    out = work.folder / "merged.safetensors"
    assert (
        merge_lora.main(["--model", model, "--models", str(hira_file), "--save_to", str(out), "--plugins", HIRA]) == 0
    )
    before, after = load_safetensors(model), load_safetensors(out)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    part = by_module(read_adapter_file(hira_file))[name]
    weight = before["double_blocks.0.img_attn.proj.weight"].float()
    expected = weight * (1 + part["hira_b"].float() @ part["hira_a"].float())
    torch.testing.assert_close(after["double_blocks.0.img_attn.proj.weight"].float(), expected, rtol=1e-2, atol=1e-3)


def test_it_stands_in_dotted_files_and_comes_back(work: Work, hira_file: Path) -> None:
    from tools import convert_lora

    dotted, back = work.folder / "dotted.safetensors", work.folder / "back.safetensors"
    assert convert_lora.main([str(hira_file), str(dotted), "--to", "lycoris", "--plugins", HIRA]) == 0
    assert convert_lora.main([str(dotted), str(back), "--to", "kohya", "--plugins", HIRA]) == 0
    first, second = read_adapter_file(hira_file), read_adapter_file(back)
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_marks_of_other_kinds_are_refused() -> None:
    from examples.plugins import hira

    register_kind(hira.KIND, "hira_a", "hira_b")  # a module that is loaded again
    before = dict(MARKS)
    with pytest.raises(ValueError, match="lora_up.weight is the mark of networks.lora:KIND already"):
        register_kind(hira.KIND, "lora_up.weight")
    assert before == MARKS


def test_installed_packages_make_kinds_known(monkeypatch, hira_file: Path) -> None:
    """Without --plugins: the entry-point group names the module, which is imported when a file has no known tensor."""
    from library.checkpoints import adapter_tensors

    marks = MARKS.pop(f"{HIRA}:KIND")
    outside = dict(adapter_tensors.OUTSIDE)
    adapter_tensors.OUTSIDE.clear()
    monkeypatch.delitem(sys.modules, HIRA)
    monkeypatch.delattr("examples.plugins.hira")
    monkeypatch.setattr(
        adapter_tensors, "installed_points", lambda group: {"hira": HIRA} if group == "adapters" else {}
    )
    adapter_tensors.load_installed_kinds.cache_clear()
    try:
        assert adapter_tensors.holds_adapter(["lora_unet_x.hira_a"])
        assert kind_of({"hira_a": torch.zeros(1, 1), "hira_b": torch.zeros(1, 1)}).name == "HiRA"
    finally:
        adapter_tensors.load_installed_kinds.cache_clear()
        MARKS[f"{HIRA}:KIND"] = marks
        adapter_tensors.OUTSIDE.update(outside)


def test_a_network_module_that_is_broken_is_one_message(work: Work, monkeypatch, capsys) -> None:
    (work.folder / "users_broken_kind.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(work.folder))
    message = refused_run("flux", work.argv("out", "--network_module=users_broken_kind"), monkeypatch, capsys)
    assert "--network_module is users_broken_kind, which cannot be imported: division by zero" in message


# ---- a trainable -----------------------------------------------------------------------------------------------------

BIASES = "examples.plugins.biases:BiasTrainable"


def without_network(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith("--network_")]


def train_biases(work: Work, out: str, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train.main(["flux", BIASES, *without_network(work.argv(out, *SHORT, *more))])
    return work.folder / out / "lora.safetensors"


def test_an_own_trainable_trains_and_resumes(work: Work) -> None:
    whole = train_biases(work, "whole", "--save_state", "--save_every_n_steps=2")
    tensors = load_safetensors(whole, device="cpu")
    assert tensors and all(name.endswith(".bias") for name in tensors)
    with safe_open(whole, "pt") as file:
        assert file.metadata()["ss_base_model_version"]
    state = next((work.folder / "whole").glob("*step00000002-state"))
    resumed = train_biases(work, "resumed", "--save_state", "--save_every_n_steps=2", f"--resume={state}")
    assert read_parts(whole)[1] == read_parts(resumed)[1]
    on = train_biases(work, "on", f"--bias_weights={whole}", "--learning_rate=0", "--max_train_steps=1")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_safetensors(on, device="cpu").items())


@dataclass(frozen=True, kw_only=True)
class ClashingOptions:
    """Names that are taken"""

    learning_rate: float = option(1.0, help="of the script")


class Clashing(BiasTrainable):
    options = ClashingOptions


class Unwritten(Trainable):
    """Nothing of what a trainable has to say."""


@pytest.mark.parametrize(
    "words, told",
    [
        (["flux", f"{FORMULAS}:charbonnier"], f"the trainable is {FORMULAS}:charbonnier, which is the function charbonnier; needed: a subclass"),
        (["flux", f"{__name__}:Unwritten"], "Unwritten, which leaves out attach, check, load, metadata, modules, param_groups, save; needed"),
        (["flux", f"{__name__}:Clashing"], "--learning_rate is declared in ClashingOptions and OptimizerOptions; an option has one place"),
        (["flux", "netwrok"], "unknown trainable 'netwrok'; did you mean 'network'?"),
        (["flex", "network"], "unknown model family 'flex'; did you mean 'flux'?"),
        (["--config_file", "train.toml"], "the following arguments are required: "),
        (["flux", "network", "--plugins", "no_such_plugin"], "--plugins is no_such_plugin; there is no module no_such_plugin"),
        (["flux", BIASES, "--bias_weights=biases.pt"], "--bias_weights is biases.pt; a safetensors file is needed"),
        (["flux", BIASES, "--network_dim=4"], "--network_dim is an option of other scripts and has no meaning here"),
    ],
)  # fmt: skip
def test_names_of_train_are_checked(words, told, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(words)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and told in message and "Traceback" not in message


# ---- image scripts ---------------------------------------------------------------------------------------------------


def test_image_scripts_take_own_kinds_and_samplers(tinies, tmp_path: Path) -> None:
    from library.generation.anima_inference import run

    work = tinies.work("anima", tmp_path)
    adapter = work.train(
        "hira", *SHORT, f"--network_module={HIRA}", "--network_alpha=0", "--network_dim=2", "--learning_rate=1"
    )
    tiny = work.tiny
    words = [
        f"--dit={tiny.anima}", f"--vae={tiny.vae}", f"--text_encoder={tiny.qwen3}",
        f"--qwen3_tokenizer={tiny.qwen3_tokenizer}",
        f"--t5_tokenizer_path={tiny.t5_tokenizer}", "--prompt=a cat", "--image_size", "32", "32", "--infer_steps=2",
        "--seed=1",
        f"--plugins={FORMULAS}",
    ]  # fmt: skip
    made = [
        run([*words, f"--save_path={tmp_path / name}", *more])[0].read_bytes()
        for name, more in (("plain", []), ("own", ["--sampler=midpoint"]), ("adapter", [f"--lora_weight={adapter}"]))
    ]  # fmt: skip
    assert len(set(made)) == 3

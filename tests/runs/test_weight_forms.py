"""Bases in fewer bits, in every family: what is stored and from which weights, files that are in scaled 8 bits already,
runs that resume, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.checkpoints import weight_forms
from library.checkpoints.weight_forms import FORMS, stored
from library.core.errors import CheckpointError
from library.fp8_optimization_utils import stored_of
from library.safetensors_utils import save_file_atomic
from library.training import start_page
from library.training.accelerator_setup import prepare_runtime
from tests.families import CASES
from tests.library.generation.tiny_scripts import rewritten
from tests.runs.conftest import fingerprint, losses_of, read_parts
from tests.runs.families import FamilyWork, Tinies, refused_run
from tests.runs.test_stored_forms import is_scaled, model_files, read, scaled

U_NETS = ("sd1", "sd2", "sdxl")
FIRST, SECOND = "--quantize_base=nf4 --quantize_text_encoder=int8", "--fp8_scaled --quantize_text_encoder=nf4"


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


class Parts:
    """Denoiser and text encoders of a command line, in forms."""

    def __init__(self, work: FamilyWork, *options: str) -> None:
        self.family = work.trainer("unused", *options).family
        self.runtime = prepare_runtime(self.family.config)

    def layers(self, form: str | None) -> dict[str, nn.Module]:
        """Every module of the models, by model and path."""
        runtime = dataclasses.replace(self.runtime, denoiser_form=form, text_form=form)
        models = [self.family.load_denoiser(runtime), *self.family.load_text_encoders(runtime)]
        return {
            f"{number}.{path}": module
            for number, model in enumerate(models) if model is not None
            for path, module in model.named_modules()
        }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_is_made_of_the_weights_of_the_file(name: str, tinies: Tinies, tmp_path: Path) -> None:
    """Layer by layer, on denoiser and text encoders; the rest keeps its type. Most of what is stored are the large
    matrices, and with four bits half a byte of each number is left, beside scales."""
    parts = Parts(tinies.work(name, tmp_path))
    plain = parts.layers(None)
    for form in FORMS:
        count = 0
        for path, layer in parts.layers(form).items():
            own = stored_of(layer)
            if own is None:
                for key, parameter in layer.named_parameters(recurse=False):
                    kept = getattr(plain[path], key)
                    assert parameter.dtype.is_floating_point and parameter.element_size() > 1, (form, path, key)
                    torch.testing.assert_close(parameter.float(), kept.float(), rtol=1e-2, atol=1e-2)
                continue
            count += 1
            block = own.shape[1] // own.scale.shape[1] if own.form == "fp8_scaled" and own.scale.ndim == 2 else None
            expected = stored(plain[path].weight, own.form, block)
            assert torch.equal(own.data.view(torch.int8), expected.data.view(torch.int8)), (form, path)
            assert own.scale is None or torch.equal(own.scale, expected.scale), (form, path)
        assert count > 12, form


@pytest.mark.parametrize("name", CASES)
def test_files_in_scaled_8_bits_stay_as_they_are(name: str, tinies: Tinies, tmp_path: Path) -> None:
    """As ComfyUI writes them, in every slot, with the scales of the file: bit by bit the weights that they stand for,
    which scaling them again or casting them would change. Other forms are made of these weights."""
    work, files, wide = tinies.work(name, tmp_path), [], []
    for number, (option, path) in enumerate(model_files(work)):
        state, metadata = read(path)
        numbers, values = scaled(state) if any(is_scaled(*item) for item in state.items()) else (state, state)
        for form, tensors, options in (("scaled", numbers, files), ("wide", values, wide)):
            save_file_atomic(tensors, tmp_path / f"{form}{number}.safetensors", metadata)
            options.append(f"{option}={tmp_path / f'{form}{number}.safetensors'}")
    parts, plain = Parts(work, *files), Parts(work, *wide).layers(None)
    assert all(stored_of(layer) is None for layer in parts.layers(None).values())
    for form in ("fp8", "fp8_scaled"):
        count = 0
        for path, layer in parts.layers(form).items():
            own = stored_of(layer)
            if own is not None and own.form == "fp8_scaled" and own.ndim == 2:
                count += torch.equal(own.widened(), plain[path].weight)
        assert count > 12, form
    for path, layer in parts.layers("int8").items():
        if (own := stored_of(layer)) is not None:
            assert torch.equal(own.data, stored(plain[path].weight, "int8").data), path


def test_weights_that_an_adapter_leaves_alone_stay_as_they_are(tinies: Tinies, tmp_path: Path) -> None:
    """What a transform of the tensors hands on unchanged keeps the numbers of the file; what it changes is scaled
    again."""
    work = tinies.work("flux", tmp_path)
    ((option, path),) = [item for item in model_files(work) if "pretrained" in item[0]]
    numbers, _ = scaled(read(path)[0])
    save_file_atomic(numbers, tmp_path / "scaled.safetensors", read(path)[1])
    parts = Parts(work, f"{option}={tmp_path / 'scaled.safetensors'}")
    plain = parts.layers(None)
    parts.family.transform = lambda files, items: (
        (key, 3 * tensor if "mlp.0.weight" in key else tensor) for key, tensor in items
    )
    changed = 0
    for path, layer in parts.layers("fp8_scaled").items():
        own = stored_of(layer)
        if own is None or not path.startswith("0."):
            continue
        if "mlp.0" in path:
            changed += torch.equal(own.scale, stored(3 * plain[path].weight, "fp8_scaled").scale)
        else:
            assert torch.equal(own.widened(), plain[path].weight), path
    assert changed == 2


def test_what_an_adapter_changes_of_numbers_without_scales(tmp_path: Path) -> None:
    """It has scales where they are asked for; else it is refused when it leaves the range."""
    from library.checkpoints.loading import open_checkpoint

    numbers = torch.randn(4, 32).to(torch.float8_e4m3fn)
    save_file_atomic({"a.weight": numbers, "b.weight": numbers}, tmp_path / "fp8.safetensors")
    source, keys = open_checkpoint(tmp_path / "fp8.safetensors"), ["a.weight", "b.weight"]

    def changed(files, items):
        return ((key, 1000 * tensor.float() if key == "a.weight" else tensor) for key, tensor in items)

    def read_in(form: str | None, dtype: torch.dtype | None = torch.bfloat16) -> dict:
        return source.tensors("cpu", False, keys, changed, source.storing(dtype, keys, form))

    found = read_in("fp8_scaled")
    assert torch.equal(found["a.weight"].scale, stored(1000 * numbers.float(), "fp8_scaled").scale)
    assert found["b.weight"].scale is None and torch.equal(found["b.weight"].data.float(), numbers.float())
    for form, dtype in (("fp8", torch.bfloat16), (None, None)):
        with pytest.raises(CheckpointError, match="a.weight"):
            read_in(form, dtype)


def test_other_numbers_with_scales(tmp_path: Path) -> None:
    """int8 with scales is read; 4-bit floats are named, not read as whole numbers."""
    from library.checkpoints.loading import open_checkpoint

    weight = torch.randn(4, 32)
    own = stored(weight, "int8")
    state = {"a.weight": own.data, "a.weight_scale": own.scale[:, None]}
    save_file_atomic(state, tmp_path / "int8.safetensors")
    source = open_checkpoint(tmp_path / "int8.safetensors")
    assert torch.equal(source.tensors("cpu", False, ["a.weight"])["a.weight"], own.widened())
    kept = source.tensors("cpu", False, ["a.weight"], cast=source.storing(torch.bfloat16, ["a.weight"], "int8"))
    assert torch.equal(kept["a.weight"].data, own.data)
    for scale in (torch.ones(4, 2, dtype=torch.uint8), torch.ones(4, 2)):
        packed = {"a.weight": torch.zeros(4, 16, dtype=torch.uint8), "a.weight_scale": scale}
        save_file_atomic(packed, tmp_path / "fp4.safetensors")
        with pytest.raises(CheckpointError, match=r"stores a.weight as uint8 with scales .*NVFP4.*--quantize_base nf4"):
            open_checkpoint(tmp_path / "fp4.safetensors")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=() if (name, options) in chosen else (pytest.mark.full,))
        for chosen in [{("flux", FIRST), ("sd1", SECOND), ("wan", FIRST)}]
        for name in CASES
        for options in (FIRST, SECOND)
    ],
)
def test_runs_train_sample_and_resume(name: str, options: str, tinies: Tinies, tmp_path: Path, caplog) -> None:
    """The loss is close to that of the base as it is; what is saved has the same tensors in the same types; a run that
    goes on from a state, with samples between, ends in the same bytes."""
    work = tinies.work(name, tmp_path)
    data = work.dataset(batch_size=2)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    first = ["--max_train_steps=4", "--gradient_checkpointing", "--mixed_precision=bf16"]
    second = [*first, *options.split(), "--save_every_n_steps=2", "--save_state"]
    second += ["--sample_every_n_steps=2", f"--sample_prompts={tmp_path / 'prompts.txt'}"]
    plain = work.train("plain", *first, dataset=data)
    whole = work.train("whole", *second, dataset=data)
    assert losses_of(whole) == pytest.approx(losses_of(plain), rel=0.1) and losses_of(whole) != losses_of(plain)
    shapes = [{key: (t.shape, t.dtype) for key, t in read(path)[0].items()} for path in (plain, whole)]
    assert shapes[0] == shapes[1]
    resumed = work.train("parts", *second, f"--resume={tmp_path / 'whole' / 'lora-step00000002-state'}", dataset=data)
    assert read_parts(resumed)[1] == read_parts(whole)[1]
    if "begins with a picture" not in caplog.text:  # which samples of these models need
        assert len(list((tmp_path / "whole" / "sample").glob("*.*"))) >= 2


def test_adapters_are_merged_before_weights_are_stored(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("flux", tmp_path)
    adapter = work.train("first", "--max_train_steps=2", "--learning_rate=1")
    merging = [f"--base_weights={adapter}"]
    runs = [work.prepare("wide", *merging), work.prepare("small", *merging, *FIRST.split())]
    assert "frozen weights in nf4, text encoders in int8" in start_page._precision(runs[1])
    wide, small = (dict(run.models.denoiser.named_modules()) for run in runs)
    compared = 0
    for path, layer in small.items():
        if (own := stored_of(layer)) is not None:
            assert torch.equal(own.data, stored(wide[path].weight, own.form).data), path
            compared += 1
    assert compared > 12


REFUSED: list[tuple[str, str, str]] = [
    ("flux", "--quantize_base=int4", "--quantize_base is 'int4'"),
    ("flux", "--quantize_base=nf4 --fp8_scaled", "--quantize_base nf4 and --fp8_scaled are set"),
    ("flux", "--quantize_base=int8 --fp8_base --mixed_precision=bf16", "have one form: leave one of them out"),
    ("sd1", "--quantize_base=int8 --network_module=lycoris.kohya", "that is int8, in which nothing can be computed"),
    ("flux", "--fp8_fast --strict", "--fp8_fast: has no effect without --fp8_scaled"),
    ("sd1", "--fp16_accumulation --strict", "--fp16_accumulation: has no effect: the device is cpu"),
    ("sd1", "--mixed_precision_transformer --mixed_precision=bf16", "the denoiser is a U-Net"),
    ("flux", "--mixed_precision_transformer", "set with --mixed_precision no; layers of several types meet in one"),
    ("wan", "--mixed_precision_transformer --mixed_precision=bf16 --fp8_scaled", "keeps weights as the file has them"),
    ("wan", "--fp8_t5 --quantize_text_encoder=nf4 --strict", "--fp8_t5: has no effect: --quantize_text_encoder nf4 says how"),
]


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_what_contradicts_itself_is_refused(name, options, words, tinies, tmp_path, monkeypatch, capsys) -> None:
    work = tinies.work(name, tmp_path)
    assert words in refused_run(work.family, work.argv("out", *options.split()), monkeypatch, capsys)


def test_what_the_machine_lacks_is_refused_with_what_works(tinies, tmp_path, monkeypatch, capsys) -> None:
    """bitsandbytes, a device for its four bits, products of 8-bit numbers, numbers of 8 bits themselves."""
    from library import device_utils, fp8_optimization_utils

    work = tinies.work("flux", tmp_path)

    def told(*options: str) -> str:
        return refused_run("flux", work.argv("out", *options), monkeypatch, capsys)

    both = ("--quantize_base=nf4", "--quantize_text_encoder=nf4")
    with monkeypatch.context() as patch:
        find = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
        message = told(*both)
        assert "bitsandbytes, which is not installed; needed: pip install bitsandbytes, or --quantize_base int8" in message
        work.train("int8", "--quantize_base=int8", "--max_train_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(weight_forms, "load_nf4", missing)
        assert "no 4-bit weights for the CPU" in told(*both)
    with monkeypatch.context() as patch:
        patch.setattr(fp8_optimization_utils, "can_multiply_fp8", lambda device: False)
        message = told("--fp8_scaled", "--fp8_fast")
        assert "the CPU cannot" in message and "leave it out: --fp8_scaled alone" in message
    with monkeypatch.context() as patch:
        patch.setattr(device_utils, "can_compute", lambda device, dtype: dtype != torch.float8_e4m3fn)
        message = told("--fp8_scaled", "--quantize_text_encoder=fp8")
        assert message.count("needed: int8 in its place") == 2


def missing(*_: Any) -> None:
    raise RuntimeError("no kernel for this device")


def test_products_in_8_bits_train(tinies: Tinies, tmp_path: Path, caplog) -> None:
    """On layers whose sizes allow it; the loss stays close, and is another."""
    work = tinies.work("flux", tmp_path)
    options = ["--max_train_steps=2", "--mixed_precision=bf16", "--fp8_scaled", "--console_log_level=INFO"]
    plain, fast = work.train("plain", *options), work.train("fast", *options, "--fp8_fast")
    assert losses_of(fast) == pytest.approx(losses_of(plain), rel=0.05)
    assert fingerprint(fast) != fingerprint(plain) and "layers of the denoiser multiply in 8 bits" in caplog.text


def test_sums_of_float16_are_those_of_one_run_and_tell_of_their_digits(tinies: Tinies, tmp_path: Path, monkeypatch, caplog) -> None:
    from library import device_utils

    work, switches = tinies.work("flux", tmp_path), torch.backends.cuda.matmul
    monkeypatch.setattr(device_utils, "fp16_sums_lack", lambda device: None)
    options = ["--max_train_steps=1", "--console_log_level=INFO", "--fp16_accumulation"]
    for precision, told in (("fp16", "sums of products keep 11 binary digits"), ("bf16", "--mixed_precision is bf16; needed: fp16")):
        caplog.clear()
        work.train(precision, *options, f"--mixed_precision={precision}")
        assert switches.allow_fp16_accumulation and told in caplog.text
        assert ("binary digits" in caplog.text) == (precision == "fp16")
    work.train("plain", *options[:2])
    assert not switches.allow_fp16_accumulation


FAMILIES_OF_TRANSFORMERS = ("flux", "wan", "hunyuan_image", "anima")


@pytest.mark.parametrize("name", FAMILIES_OF_TRANSFORMERS)
def test_a_frozen_denoiser_keeps_the_types_of_its_file(name, tinies: Tinies, tmp_path: Path, caplog) -> None:
    """A file of one type trains as without the option; of another the matrices alone are narrow."""
    work, files = tinies.work(name, tmp_path), {}
    for way in ("whole", "mixed"):
        files[way] = tmp_path / f"{way}.safetensors"
        rewritten(denoiser_of(work), files[way], torch.bfloat16, only_matrices=way == "mixed")
    plain = ["--max_train_steps=2", "--mixed_precision=bf16", "--gradient_checkpointing", "--console_log_level=INFO"]
    kept = [*plain, "--mixed_precision_transformer"]

    def trained(folder: str, way: str, words: list[str]) -> Path:
        return work.train(folder, *words, f"--pretrained_model_name_or_path={files[way]}")

    first, same = trained("first", "whole", plain), trained("same", "whole", kept)
    assert fingerprint(same) == fingerprint(first)
    caplog.clear()
    other = trained("other", "mixed", kept)
    assert re.search(r"tensors of bfloat16.*between layers bfloat16", caplog.text)
    assert losses_of(other) == pytest.approx(losses_of(first), rel=0.05) and fingerprint(other) != fingerprint(first)
    run = work.prepare("held", *kept, f"--pretrained_model_name_or_path={files['mixed']}")
    kinds = {parameter.dtype for parameter in run.models.denoiser.parameters()}
    assert kinds == {torch.bfloat16, torch.float32}


def denoiser_of(work: Any) -> Path:
    (word,) = (word for word in work.argv("x") if word.startswith("--pretrained_model_name_or_path="))
    return Path(word.partition("=")[2])

"""Textual inversion through its command line, on every family that has it: what learns, the file, resuming, what goes
with it, what is refused."""

from __future__ import annotations

import re
import shutil
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from library.components.unet_models import text_layers
from library.core.errors import ConfigError
from library.core.registry import import_target
from library.families.registry import FAMILIES, record_of
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.sd_utils import inspect_sd_unet
from library.tiny_models import build_tiny
from library.training import cli, parser_common
from library.training.loop import fit
from library.training.run import Run
from library.training.trainables.textual_inversion import LayeredTextualInversion, TextualInversion
from tests.families import CASES, marks_of
from tests.runs.conftest import Stopped, Work, draw_pictures, fingerprint, read_parts, sample_pictures, stop_after

SETS = {
    **{name: (name, TextualInversion) for name, case in CASES.items() if FAMILIES[case.family].embedding_keys},
    "sd1 by layers": ("sd1", LayeredTextualInversion), "sd2 by layers": ("sd2", LayeredTextualInversion),
}
"""name -> (tiny set, what is learned)"""
WORDS = ["--token_string=zyx", "--num_vectors_per_token=2", "--init_word=cat", "--save_model_as=safetensors"]


class WordWork(Work):
    """The short run of a family, with a word in its captions."""

    trainable = TextualInversion

    @property
    def file_keys(self) -> list[str]:
        """Tensors of the file."""
        if self.trainable is TextualInversion:
            return list(self.keys)
        return text_layers(inspect_sd_unet(self.tiny.model).params)

    @property
    def keys(self) -> tuple[str, ...]:
        return FAMILIES[self.case.family].embedding_keys

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        words = super().argv(out, *WORDS, dataset=dataset)
        return [*(word for word in words if not word.startswith(("--network_module", "--network_dim"))), *more]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=marks_of(case)) for name, (case, _) in SETS.items()])
def tiny_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    name, trainable = SETS[request.param]
    return name, trainable, build_tiny(name, tmp_path_factory.mktemp(name))


@pytest.fixture
def work(tiny_set, tmp_path: Path) -> WordWork:
    name, trainable, tiny = tiny_set
    images = draw_pictures(tmp_path / "images", 4)
    for path in images.glob("*.txt"):
        path.write_text(f"a zyx, {path.stem}", encoding="utf-8")
    work = WordWork(tmp_path, tiny, images, case=CASES[name])
    work.trainable = trainable
    return work


def frozen_weights(run: Run) -> dict[str, torch.Tensor]:
    parts = {"denoiser": run.models.denoiser, **{f"text {i}": e for i, e in enumerate(run.models.text_encoders) if e}}
    return {
        f"{part}.{name}": p.detach().clone() for part, module in parts.items() for name, p in module.named_parameters()
    }


def test_the_new_rows_learn_and_nothing_else(work: WordWork) -> None:
    """The loss of a batch with its own noise falls; all other weights stay to the bit; the file gives the same loss."""
    run = work.prepare("out", "--max_train_steps=6", "--learning_rate=0.1", "--save_precision=float")
    batch = next(run.data.batches(1))

    def loss(run: Run, untouched: bool = False) -> float:
        with torch.no_grad(), run.weights_for_eval():
            if not untouched:
                return run.step(batch).loss_sum.item()
            with run.trainable.disabled():
                return run.step(batch).loss_sum.item()

    frozen, start = frozen_weights(run), loss(run)
    count = 2 * len(work.file_keys) // len(work.keys)
    assert {key: len(rows) for key, rows in run.trainable.rows.items()} == dict.fromkeys(work.keys, count)
    fit(run)
    end = loss(run)
    assert end < start and loss(run, untouched=True) == start
    now = frozen_weights(run)
    assert now.keys() == frozen.keys() and all(torch.equal(now[name], frozen[name]) for name in now)
    file = work.folder / "out" / "lora.safetensors"
    written = load_safetensors(str(file))
    assert written.keys() == set(work.file_keys)
    widths = run.family.embedding_widths()
    for key, rows in written.items():
        assert rows.shape == (2, widths.get(key, widths[work.keys[0]])) and not torch.equal(rows[0], rows[1])
    metadata = read_parts(file)[0]
    assert metadata["modelspec.architecture"].endswith("/textual-inversion") and metadata["ss_token_string"] == "zyx"
    assert loss(work.prepare("next", f"--weights={file}")) == end


def test_the_same_command_writes_the_same_bytes_also_when_resumed(work: WordWork) -> None:
    """With validation, samples, averages and checkpointed activations around the steps of one of them."""
    prompts = work.folder / "prompts.txt"
    prompts.write_text("a zyx --w 64 --h 64 --s 1 --d 1 --l 2 --n no zyx\n", encoding="utf-8")
    around = [
        f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--ema", "--ema_decay=0.5",
        "--lr_scheduler=cosine", "--max_train_steps=4", "--use_style_template",
    ]
    data = work.dataset(dataset_keys="validation_split = 0.25")
    first = work.train("first", *around, dataset=data)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train("parts", *around, "--save_every_n_steps=2", "--save_state", dataset=data)
    resumed = work.train("parts", *around, "--resume=latest", dataset=data)
    assert fingerprint(first) == fingerprint(resumed)
    averages = [path.with_name("lora-ema.safetensors") for path in (first, resumed)]
    assert fingerprint(averages[0]) == fingerprint(averages[1])
    assert len(sample_pictures(work.folder / "first")) == 2
    assert read_parts(work.train("captions", "--max_train_steps=1", dataset=data))[1] != read_parts(first)[1]


@pytest.mark.parametrize("tiny_set", [
    "sdxl", "sd1 by layers", *(pytest.param(name, marks=pytest.mark.full) for name in ("sd1", "sd2", "sd3", "flux")),
], indirect=True)  # fmt: skip
def test_masks_and_weighted_captions_count(work: WordWork) -> None:
    """A black mask leaves nothing to learn, half a mask something else than none. Weights of captions count where the
    family reads them; a weight of 1 is none."""
    masks = work.folder / "masks"
    masks.mkdir()
    data = work.dataset(subset_keys=f"conditioning_data_dir = '{masks}'", name="masked.toml")
    plain = ["--max_train_steps=1", "--optimizer_args", "weight_decay=0"]
    rows = {"none": read_parts(work.train("none", *plain))[1]}
    for name, share in (("half", 0.5), ("black", 0.0)):
        for path in work.images.glob("*.png"):
            mask = Image.new("RGB", Image.open(path).size, (0, 0, 0))
            mask.paste((255, 255, 255), (0, 0, round(mask.width * share), mask.height))
            mask.save(masks / path.name)
        rows[name] = read_parts(work.train(name, *plain, "--masked_loss", dataset=data))[1]
    start = read_parts(work.train("start", *plain, "--learning_rate=1e-30"))[1]
    assert rows["black"] == start != rows["none"] and rows["half"] not in (start, rows["none"])
    if "--weighted_captions" not in parser_common.build_parser(work.case.family, work.trainable.name).format_help():
        return
    for weight in ("1.0", "1.9"):
        for path in work.images.glob("*.txt"):
            path.write_text(f"a (zyx:{weight}), {path.stem}", encoding="utf-8")
        try:
            rows[weight] = read_parts(work.train(weight, *plain, "--weighted_captions"))[1]
        except ConfigError as error:
            assert "--weighted_captions" in str(error)
            return
    assert rows["1.0"] == rows["none"] != rows["1.9"]


def test_captions_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny, images = build_tiny("sd1", tmp_path / "tiny"), draw_pictures(tmp_path / "images", 3)
    work = WordWork(tmp_path, tiny, images, case=CASES["sd1"])
    for path, caption in zip(sorted(work.images.glob("*.txt")), ("a zyx", "a zyxland", "zyx in zyxland"), strict=True):
        path.write_text(caption, encoding="utf-8")
    work.prepare("out")
    told = [record.getMessage() for record in caplog.records]
    assert any("1 of 3 captions do not hold the word 'zyx'" in line for line in told)
    assert any("stands inside longer words" in line and "in 2 captions" in line for line in told)


@pytest.mark.parametrize("words, told", [
    (["--token_string=cat"], "has 'cat' as a token"),
    (["--token_string="], "--token_string is not given"),
    (["--init_word= "], "the initial word gives no token"),
    (["--weights={other}"], "--num_vectors_per_token is 2"),
    (["--weights={other}", "--num_vectors_per_token=3"], "holds vectors of 4 values in .*; the text encoder has"),
    (["--cache_text_encoder_outputs"], "its outputs are new|their outputs are new"),
    (["--caption_dropout_rate=0.1"], "teaches nothing about it"),
    (["--network_dim=4"], "--network_dim"),
    (["--learning_rate=0"], "there is nothing to train"),
    (["--textual_inversion_embeddings={zyx}"], r"zyx.safetensors gives the word 'zyx', which this run learns"),
    (["--num_vectors_per_token=600"], r"num_vectors_per_token is 600, and a caption has room for \d+ tokens"),
])  # fmt: skip
def test_what_cannot_be(
    work: WordWork, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One message, before a model is loaded."""
    other = work.folder / "other.safetensors"
    save_file_atomic({key: torch.zeros(3, 4) for key in work.file_keys}, other)
    zyx = Path(shutil.copy(other, other.with_name("zyx.safetensors")))
    family = import_target(record_of(work.case.family).family)
    for name in ("load_vae", "load_text_encoders", "load_denoiser"):
        monkeypatch.setattr(family, name, lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit):
        cli.main(work.case.family, work.trainable.name, work.argv("out", *(word.format(other=other, zyx=zyx) for word in words)))
    message = capsys.readouterr().err
    assert re.search(told, message) and message.count("error: ") == 1 and "Traceback" not in message


def test_a_family_without_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for family, trainable, told in (
        ("anima", "textual_inversion", "anima has no textual inversion"),
        ("sdxl", "textual_inversion_xti", "sdxl has no words with vectors for each layer"),
    ):
        with pytest.raises(SystemExit):
            cli.main(family, trainable, ["--token_string=zyx", f"--output_dir={tmp_path}"])
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flux", "sd1"])
def test_sample_prompts_know_words_of_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A word whose vectors are those of a known one makes the picture of that: beside cached captions, and beside a
    word that learns. Captions do not know it."""
    case, tiny = CASES[name], build_tiny(name, tmp_path / "tiny")
    work = (Work if name == "flux" else WordWork)(tmp_path, tiny, draw_pictures(tmp_path / "images", 2), case=case)
    family = import_target(record_of(case.family).family)
    config = parser_common.parse_command(work.argv("out"), case.family, work_kind(work)).config
    loaded = family(config)
    runtime = SimpleNamespace(weight_dtype=torch.float32, text_encoder_dtype=torch.float32, device="cpu", text_form=None)
    vectors = {}
    keys, tokenizers = FAMILIES[case.family].embedding_keys, loaded.strategies().tokenize.tokenizers
    for key, tokenizer, encoder in zip(keys, tokenizers, loaded.load_text_encoders(runtime), strict=True):
        (number,) = tokenizer("cat", add_special_tokens=False).input_ids
        vectors[key] = encoder.get_input_embeddings().weight[number][None].detach().clone()
    save_file_atomic(vectors, tmp_path / "qux.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a {word} --w 64 --h 64 --s 1 --d 1 --l 1\n" for word in ("cat", "qux", "dog")))
    words = [f"--textual_inversion_embeddings={tmp_path / 'qux.safetensors'}", f"--sample_prompts={prompts}"]
    more = ["--network_train_unet_only", "--cache_text_encoder_outputs"] if name == "flux" else []
    work.train("out", *words, *more, "--max_train_steps=1", "--sample_at_first")
    pictures = [path.read_bytes() for path in sample_pictures(tmp_path / "out") if "000000" in path.name]
    cat, qux, dog = (Image.open(BytesIO(data)).tobytes() for data in pictures)
    assert cat == qux != dog
    with pytest.raises(SystemExit):
        cli.main(case.family, work_kind(work), work.argv("out", *words, "--strict"))
    assert "its words are for sample images, and none are made" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main("anima", "network", ["--textual_inversion_embeddings=a.safetensors", f"--output_dir={tmp_path}"])
    assert "--textual_inversion_embeddings: anima has no textual inversion" in capsys.readouterr().err


def work_kind(work: Work) -> str:
    return work.trainable.name if isinstance(work, WordWork) else "network"

"""An adapter and a new word in one run, through the command lines of every family that has words: what learns, the
files, going on from them, resuming, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError
from library.core.registry import import_target
from library.families.registry import FAMILIES, record_of
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.tiny_models import build_tiny
from library.training import cli
from library.training.loop import fit
from library.training.run import Run
from library.training.trainables.network_words import NetworkWithWords
from tests.families import CASES
from tests.runs.conftest import Stopped, Work, draw_pictures, fingerprint, read_parts, stop_after

FAMILIES_WITH_WORDS = [
    pytest.param(name, marks=pytest.mark.full) if name == "sd2" else name  # as Stable Diffusion 1
    for name, case in CASES.items()
    if FAMILIES[case.family].embedding_keys
]
WORDS = ["--token_string=zyx", "--num_vectors_per_token=2", "--init_word=cat"]


class BothWork(Work):
    """The short run of a family, with a word beside the adapter."""

    trainable = NetworkWithWords

    @property
    def keys(self) -> tuple[str, ...]:
        return FAMILIES[self.case.family].embedding_keys

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        return super().argv(out, *WORDS, *more, dataset=dataset)


@pytest.fixture(scope="module", params=FAMILIES_WITH_WORDS)
def tiny_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return request.param, build_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def work(tiny_set, tmp_path: Path) -> BothWork:
    name, tiny = tiny_set
    images = draw_pictures(tmp_path / "images", 4)
    for path in images.glob("*.txt"):
        path.write_text(f"a zyx, {path.stem}", encoding="utf-8")
    return BothWork(tmp_path, tiny, images, case=CASES[name])


def test_both_learn_and_are_read_again(work: BothWork) -> None:
    """The loss of a batch falls; the bundle goes on where the run ended; the word's own file is that of a textual
    inversion. The U-Net or transformer alone has the adapter here, so that text encoders run for the word's sake."""
    run = work.prepare(
        "out", "--max_train_steps=4", "--embedding_lr=0.1", "--save_precision=float", "--network_train_unet_only"
    )
    batch = next(run.data.batches(1))

    def loss(run: Run) -> float:
        with torch.no_grad(), run.weights_for_eval():
            return run.step(batch).loss_sum.item()

    start, rates = loss(run), {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    assert rates["embeddings"] == 0.1 and 0.01 in rates.values()
    with torch.no_grad():
        texts = run.step.conditioning_of(batch)
    begun = {key: rows.detach().clone() for key, rows in run.trainable.word.rows.items()}
    fit(run)
    end = loss(run)
    with torch.no_grad(), run.weights_for_eval():
        now = run.step.conditioning_of(batch)
        with run.trainable.disabled():
            before = run.step.conditioning_of(batch)
    assert all(torch.equal(before[key], states) for key, states in texts.items())
    assert any(not torch.equal(now[key], states) for key, states in texts.items())
    bundle, word = (work.folder / "out" / f"lora{ending}.safetensors" for ending in ("", "-zyx"))
    tensors, own = load_safetensors(str(bundle)), load_safetensors(str(word))
    assert end < start and own.keys() == set(work.keys)
    assert all(torch.equal(tensors[f"bundle_emb.zyx.{key}"], rows) for key, rows in own.items())
    assert all(not torch.equal(rows, begun[key].to(rows)) for key, rows in own.items())
    prefixes = {key[:7] for key in tensors}
    assert "lora_un" in prefixes and "lora_te" not in prefixes
    architectures = [read_parts(path)[0]["modelspec.architecture"] for path in (bundle, word)]
    assert [text.rpartition("/")[2] for text in architectures] == ["lora", "textual-inversion"]
    still = work.prepare("next", f"--network_weights={bundle}", "--network_train_unet_only", "--embedding_lr=0")
    assert loss(still) == end and "embeddings" not in {group["name"] for group in still.optimizer.param_groups}
    separate = work.prepare("third", f"--network_weights={bundle}", f"--weights={word}", "--network_train_unet_only")
    assert loss(separate) == end


def brief_work(folder: Path) -> BothWork:
    """Of the smallest family."""
    images = draw_pictures(folder / "images", 2)
    for path in images.glob("*.txt"):
        path.write_text("a zyx", encoding="utf-8")
    return BothWork(folder, build_tiny("sd1", folder / "tiny"), images, case=CASES["sd1"])


def test_the_word_learns_beside_an_adapter_that_stays(tmp_path: Path) -> None:
    """With a rate of 0 for the adapter alone; where the word has none either, that is refused."""
    work = brief_work(tmp_path)
    still = ["--network_train_unet_only", "--learning_rate=0"]
    run = work.prepare("out", *still, "--embedding_lr=0.1", "--max_train_steps=1")
    begun = [p.detach().clone() for p in run.trainable.network.parameters()]
    rows = {key: vectors.detach().clone() for key, vectors in run.trainable.word.rows.items()}
    assert [group["name"] for group in run.optimizer.param_groups] == ["embeddings"]
    fit(run)
    assert all(torch.equal(a, b) for a, b in zip(begun, run.trainable.network.parameters(), strict=True))
    assert all(not torch.equal(vectors, rows[key]) for key, vectors in run.trainable.word.rows.items())
    with pytest.raises(ConfigError, match="every learning rate is 0"):
        work.prepare("none", *still)


def test_the_same_bytes_also_when_resumed_with_averages_and_caches_of_latents(work: BothWork) -> None:
    """Text encoders have adapters too; files of the averages hold the word, and its own file has an average."""
    around = [
        "--max_train_steps=4", "--ema", "--ema_decay=0.5", "--cache_latents", "--text_encoder_lr=1e-3",
        "--use_object_template",
    ]  # fmt: skip
    first = work.train("first", *around)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train("parts", *around, "--save_every_n_steps=2", "--save_state")
    work.train("parts", *around, "--resume=latest")
    written = ("lora", "lora-ema", "lora-zyx", "lora-zyx-ema")
    for name in written:
        a, b = (work.folder / out / f"{name}.safetensors" for out in ("first", "parts"))
        assert fingerprint(a) == fingerprint(b), name
    held = [load_safetensors(str(first.with_name(f"{name}.safetensors"))) for name in written]
    key = work.keys[0]
    assert not torch.equal(held[0][f"bundle_emb.zyx.{key}"], held[1][f"bundle_emb.zyx.{key}"])
    assert torch.equal(held[1][f"bundle_emb.zyx.{key}"], held[3][key])
    prefixes = {name.partition("_text_model")[0] for name in held[0] if name.startswith("lora_te")}
    assert prefixes == {part.rstrip("_") for part in work.case.text_parts}


def test_where_the_vectors_are_written(tmp_path: Path) -> None:
    """Into the adapter's file, or into one of their own; a pickle goes on as safetensors do."""
    work = brief_work(tmp_path)
    brief = ["--max_train_steps=1", "--network_train_unet_only"]
    separate = work.train("separate", *brief, "--embedding_files=separate")
    assert not any(key.startswith("bundle_emb") for key in load_safetensors(str(separate)))
    own = load_safetensors(str(separate.with_name("lora-zyx.safetensors")))["emb_params"]
    work.train("bundle", *brief, "--embedding_files=bundle", "--save_model_as=pt")
    pickle = tmp_path / "bundle" / "lora.pt"
    held = torch.load(pickle, weights_only=True)["bundle_emb.zyx.emb_params"]
    assert torch.equal(held, own) and not list(pickle.parent.glob("lora-zyx*"))
    still = work.prepare("next", f"--network_weights={pickle}", "--network_train_unet_only", "--embedding_lr=0")
    assert torch.equal(still.trainable.word.rows["emb_params"].cpu(), held)


@pytest.mark.parametrize("words, told", [
    (["--token_string=cat"], "has 'cat' as a token"),
    (["--init_word= "], "the initial word gives no token"),
    (["--weights={other}"], "--weights .*other.safetensors has 3 vectors"),
    (["--weights={wide}"], "holds vectors of 4 values in .*the text encoder has"),
    (["--network_weights={bundle}"], "--network_weights .*bundle.safetensors has 3 vectors"),
    (["--embedding_lr=-1"], "--embedding_lr is -1.0; needed: 0 or more"),
    (["--cache_text_encoder_outputs", "--network_train_unet_only"], "so leave that out|are encoded in the step"),
    (["--token_string=z.x"], "cannot have a dot"),
    (["--textual_inversion_embeddings=zyx.pt"], "zyx.pt gives the word 'zyx', which this run learns"),
    (["--caption_dropout_rate=2", "--init_word= ", "--weights={other}"], "--init_word is empty"),
])  # fmt: skip
def test_what_cannot_be(
    work: BothWork, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One message, before a model is loaded."""
    files = {name: work.folder / f"{name}.safetensors" for name in ("other", "wide", "bundle")}
    save_file_atomic({key: torch.zeros(3, 4) for key in work.keys}, files["other"])
    save_file_atomic({key: torch.zeros(2, 4) for key in work.keys}, files["wide"])
    save_file_atomic({
        **{f"bundle_emb.zyx.{key}": torch.zeros(3, 4) for key in work.keys},
        "lora_unet_a.lora_down.weight": torch.zeros(4, 4), "lora_unet_a.lora_up.weight": torch.zeros(4, 4),
    }, files["bundle"])  # fmt: skip
    family = import_target(record_of(work.case.family).family)
    for name in ("load_vae", "load_text_encoders", "load_denoiser"):
        monkeypatch.setattr(family, name, lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit):
        cli.main(work.case.family, "network", work.argv("out", *(word.format(**files) for word in words)))
    message = capsys.readouterr().err
    assert re.search(told, message) and message.count("error: ") == 1 and "Traceback" not in message


def test_word_options_without_a_word_are_listed(work: BothWork, capsys: pytest.CaptureFixture) -> None:
    """And so are words of the adapter's file that the run does not go on with."""
    bundle = work.folder / "bundle.safetensors"
    save_file_atomic({
        **{f"bundle_emb.abc.{key}": torch.zeros(3, 4) for key in work.keys},
        "lora_unet_a.lora_down.weight": torch.zeros(4, 4), "lora_unet_a.lora_up.weight": torch.zeros(4, 4),
    }, bundle)  # fmt: skip
    argv = Work.argv(work, "out", "--init_word=cat", "--embedding_lr=1", f"--network_weights={bundle}", "--strict")
    with pytest.raises(SystemExit):
        cli.main(work.case.family, "network", argv)
    message = capsys.readouterr().err
    assert "--token_string is not given" in message and "--init_word" in message and "--embedding_lr" in message
    assert f"the word 'abc' in --network_weights {bundle}" in message
    assert "--token_string abc goes on with it" in message

"""Files of textual inversions: what is read, and that diffusers reads ours to the same effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.checkpoints.embeddings import read_inversion, read_word
from library.components.tokenizers import load_clip_tokenizer
from library.core.errors import CheckpointError, ConfigError
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.families.registry import FAMILIES
from library.generation.prompt_encoder import PromptEncoder
from library.generation.words import PromptWords, read_words
from library.safetensors_utils import save_file_atomic
from library.sd_utils import load_text_encoder_sd
from library.strategy_sd import SdTextEncodingStrategy, SdTokenizeStrategy
from library.components.word_rows import EmbeddingRows
from networks.files.network_files import write_adapter_file
from tests.tiny import build_tiny_sd

SD, SDXL = FAMILIES["sd"].embedding_keys, FAMILIES["sdxl"].embedding_keys


def saved(path: Path, content: object) -> str:
    if path.suffix == ".safetensors":
        save_file_atomic(content, path)
    else:
        torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("name, content", [
    ("a.safetensors", {"emb_params": torch.ones(2, 4)}),
    ("a.pt", {"emb_params": torch.ones(2, 4)}),
    ("a.bin", {"<zyx>": torch.ones(2, 4)}),
    ("web.pt", {"name": "zyx", "string_to_param": {"*": torch.ones(2, 4)}}),
    ("row.bin", {"zyx": torch.ones(4)}),
    ("first.pt", {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 4))})}),
    ("eighth.safetensors", {"emb_params": torch.ones(2, 4, dtype=torch.float8_e4m3fn)}),
])  # fmt: skip
def test_files_for_one_encoder(tmp_path, name, content):
    (rows,) = read_inversion(saved(tmp_path / name, content), SD)
    assert rows.shape == (1 if name == "row.bin" else 2, 4) and bool((rows == 1).all())


@pytest.mark.parametrize("name, content, needle", [
    ("a.pt", "hello", "a text file"),
    ("a.safetensors", None, "a folder"),
    ("b.pt", {"step": print}, "holds more than weights"),
    ("c.pt", {f"layer{number:02}": torch.ones(2) for number in range(30)}, "layer15 and 14 more tensors"),
    ("d.pt", None, "no such file"),
])  # fmt: skip
def test_wrong_files_are_named_in_a_line(tmp_path, name, content, needle):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        saved(path, content)
    elif needle == "a folder":
        path.mkdir()
    with pytest.raises(CheckpointError) as caught:
        read_inversion(str(path), SD)
    assert needle in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_file_tells_the_word_that_it_was_trained_for(tmp_path, caplog):
    """The name of a file is its word in prompts; `cat-zyx` is how a training of an adapter names that of zyx."""
    kept, renamed, pickled = tmp_path / "zyx.safetensors", tmp_path / "cat-zyx.safetensors", tmp_path / "abc.pt"
    for path in (kept, renamed):
        write_adapter_file(str(path), {"emb_params": torch.ones(1, 4)}, None, {"ss_token_string": "zyx"})
    saved(pickled, {"emb_params": torch.ones(1, 4)})
    files = [str(path) for path in (kept, renamed, pickled)]
    found = read_words(files, (), {"emb_params": 4}, "textual_inversion_embeddings")
    assert [(word.word, word.trained_as) for word in found] == [("zyx", "zyx"), ("cat-zyx", "zyx"), ("abc", "")]
    words = PromptWords([None], [None], SD)
    with caplog.at_level("INFO"):
        for word in found:
            words.add(word)
    (told,) = [message for message in caplog.messages if "was trained as" in message]
    assert f"{renamed} was trained as 'zyx'" in told and "'cat-zyx'" in told
    pickled.write_text("hello")
    with pytest.raises(ConfigError, match=r"^--textual_inversion_embeddings: .*abc.pt is a text file"):
        read_words([str(pickled)], (), {"emb_params": 4}, "textual_inversion_embeddings")


def test_files_for_several_encoders(tmp_path):
    both = saved(tmp_path / "both.safetensors", {"clip_l": torch.ones(2, 4), "clip_g": torch.ones(2, 6)})
    one = saved(tmp_path / "one.safetensors", {"clip_g": torch.ones(2, 6)})
    other = saved(tmp_path / "other.safetensors", {"clip_l": torch.ones(2, 4), "t5xxl": torch.ones(2, 6)})
    assert [tuple(rows.shape) for rows in read_inversion(both, SDXL)] == [(2, 4), (2, 6)]
    first, second = read_inversion(one, SDXL, partly=True)
    assert first is None and second.shape == (2, 6)
    for path, keys in ((one, SDXL), (both, SD), (saved(tmp_path / "sd.pt", {"emb_params": torch.ones(1, 4)}), SDXL)):
        with pytest.raises(CheckpointError):
            read_inversion(path, keys)
    if any("t5xxl" in record.embedding_keys for record in FAMILIES.values()):
        with pytest.raises(CheckpointError):
            read_inversion(other, SDXL, partly=True)


def test_diffusers_and_image_scripts_load_it_and_compute_the_same(tmp_path):
    """In image scripts the word stands for all vectors. diffusers knows them as zyx, zyx_1, zyx_2; its prompt
    conversion puts them all in."""
    from diffusers.loaders import TextualInversionLoaderMixin

    tiny = build_tiny_sd(tmp_path / "tiny", "sd1")
    ours, theirs = (load_text_encoder_sd(tiny.model, False, torch.float32, "cpu") for _ in range(2))
    table = ours.get_input_embeddings()
    rows = torch.nn.Parameter(torch.randn(3, table.embedding_dim, generator=torch.Generator().manual_seed(0)))
    file = tmp_path / "zyx.safetensors"
    write_adapter_file(str(file), {"emb_params": rows.detach()}, None, {})

    from tokenizers import AddedToken

    words = ["zyx", "zyx1", "zyx2"]
    tokenizer = load_clip_tokenizer(str(tiny.tokenizer))
    first = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    ours.set_input_embeddings(EmbeddingRows(table, rows, first))
    tokenize = SdTokenizeStrategy(tokenizer=tokenizer)
    (states,) = SdTextEncodingStrategy().encode_tokens(tokenize, [ours], tokenize.tokenize("a zyx zyx1 zyx2, cat"))
    (known,) = SdTextEncodingStrategy().encode_tokens(tokenize, [ours], tokenize.tokenize("a cat"))

    words_of_files = load_clip_tokenizer(str(tiny.tokenizer))
    prompts = PromptEncoder(
        lambda length: SdTokenizeStrategy(tokenizer=words_of_files), SdTextEncodingStrategy(), TEXT_LAYOUTS["sd"],
        [load_text_encoder_sd(tiny.model, False, torch.float32, "cpu")], [words_of_files], SD,
    )
    prompts.words.add(read_word(str(file), "zyx", {"emb_params": table.embedding_dim}, "textual_inversion_embeddings"))
    assert torch.equal(prompts.encode("a zyx, cat", 1)["hidden_state"], states)

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict = {}

        def __init__(self) -> None:
            self.tokenizer, self.text_encoder = load_clip_tokenizer(str(tiny.tokenizer)), theirs

    pipeline = Pipeline()
    before = theirs.text_model(input_ids=tokenize.tokenize("a cat")[0][0]).last_hidden_state
    pipeline.load_textual_inversion(str(file), token="zyx")
    text = pipeline.maybe_convert_prompt("a zyx, cat", pipeline.tokenizer)
    ids = SdTokenizeStrategy(tokenizer=pipeline.tokenizer).tokenize(text)[0][0]
    assert torch.equal(theirs.text_model(input_ids=ids).last_hidden_state, states)
    assert torch.equal(before, known)

"""The tokenizer of Gemma 2: byte pairs with a start token, from a folder, the model file, or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from library.components import tokenizers
from library.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GEMMA2_HUB_ID = "google/gemma-2-2b"
_PAD, _EOS, _BOS, _UNK = "<pad>", "<eos>", "<bos>", "<unk>"
_CONTROL_PIECE, _USER_PIECE = 3, 4


def load_gemma2_tokenizer(
    folder: str | None = None,
    cache_dir: str | None = None,
    model_path: str | None = None,
    *,
    max_length: int = 256,
    option: str = "--gemma2_tokenizer",
) -> PreTrainedTokenizerFast:
    """The tokenizer of Gemma 2; `model_path` is the text encoder, a file of which may carry it (an entry
    `spiece_model`) and a folder hold it.

    ConfigError naming every way to provide one, with the command that fetches it, when none is there.
    """
    hub_id = GEMMA2_HUB_ID
    tokenizer = tokenizers.first_found(
        [
            lambda: tokenizers.from_option(folder, option, read_gemma_folder),
            lambda: tokenizers.from_cache(cache_dir, hub_id, read_gemma_folder),
            lambda: _from_model(model_path),
            lambda: tokenizers.from_hub(hub_id, None, cache_dir, read_gemma_folder),
        ],
        f"no Gemma 2 tokenizer: fetch that of {hub_id} (its page on the hub asks to accept a licence, then hf auth"
        f' login) with hf download {hub_id} --include "tokenizer*" --local-dir FOLDER, and give FOLDER with {option}; or'
        f" put it under --tokenizer_cache_dir as {hub_id.replace('/', '_')}; or use a text encoder file that carries it"
        " (an entry spiece_model), as files for ComfyUI do",
    )
    tokenizer.model_max_length = max_length
    return tokenizer


def _from_model(model_path: str | None) -> PreTrainedTokenizerFast | None:
    if model_path and Path(model_path).is_dir():
        path = Path(model_path)
        return next(filter(None, map(read_gemma_folder, (path, path.parent / "tokenizer"))), None)
    return tokenizers.from_entry(model_path, gemma_tokenizer_from_sentencepiece)


@tokenizers.reader
def read_gemma_folder(path: Path) -> PreTrainedTokenizerFast | None:
    """From a folder with tokenizer.json or tokenizer.model (or one that has it in `tokenizer`), or from such a file."""
    found = tokenizers.tokenizer_json(path, "tokenizer")
    if found is not None:
        tokenizer = tokenizers.from_tokenizer_json(found, eos=_EOS, pad=_PAD, bos=_BOS, ends_texts=False)
        ids = tokenizer("a").input_ids
        if tokenizer.bos_token_id is None or not ids or ids[0] != tokenizer.bos_token_id:
            raise ConfigError(
                f"{found} does not begin texts with the start token {_BOS}; its post-processor must add it"
            )
        return tokenizer
    for candidate in (path, path / "tokenizer.model", path / "tokenizer" / "tokenizer.model"):
        if candidate.is_file():
            return gemma_tokenizer_from_sentencepiece(candidate.read_bytes(), str(candidate))
    return None


def gemma_tokenizer_from_sentencepiece(model: bytes, source: str) -> PreTrainedTokenizerFast:
    """A Gemma tokenizer from the bytes of a sentencepiece model of byte pairs, without the sentencepiece package.

    `source` names the bytes in messages. CheckpointError when they are no such model.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    pieces, _ = tokenizers.read_sentencepiece_model(model, source)
    ids = {text: number for number, (text, _, _) in enumerate(pieces)}
    missing = [token for token in (_PAD, _EOS, _BOS, _UNK) if token not in ids]
    if missing:
        lacking = " and ".join(missing)
        raise CheckpointError(f"{source} is a sentencepiece model without {lacking}; a Gemma tokenizer has them")
    merges = generate_merges(ids, {text: score for text, score, _ in pieces})
    core = Tokenizer(models.BPE(ids, merges, unk_token=_UNK, fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, ids[_BOS])])
    whole = [(text, kind) for text, _, kind in pieces if kind in (_CONTROL_PIECE, _USER_PIECE)]
    core.add_tokens([AddedToken(text, special=kind == _CONTROL_PIECE, normalized=False) for text, kind in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD, unk_token=_UNK, padding_side="right"
    )

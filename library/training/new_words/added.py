"""A word that learns together with an adapter: it goes on from the adapter's file, and is written into it or beside
it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from library.checkpoints.embeddings import bundle_of, bundled_rows
from library.core.options import Ignored
from library.training.checkpoint import AVERAGED
from library.training.hooks.base import Hook
from library.training.new_words import AddedWordOptions
from library.training.new_words.learned import LearnedWord
from networks.files.network_files import write_adapter_file

if TYPE_CHECKING:
    from library.training.run import Run


class AddedWord(LearnedWord):
    """`network_weights`: the adapter's file to start from, whose vectors of this word count where --weights is not
    given."""

    opts: AddedWordOptions

    def __init__(self, opts: AddedWordOptions, network_weights: str | None) -> None:
        super().__init__(opts)
        self.network_weights = network_weights or ""

    @property
    def in_network(self) -> bool:
        return not self.opts.weights and self.opts.token_string in bundled_rows(self.network_weights)

    @property
    def start_file(self) -> str:
        return f"--network_weights {self.network_weights}" if self.in_network else super().start_file

    def read_start(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        if not self.in_network:
            return super().read_start(keys)
        return bundled_rows(self.network_weights, keys)[self.opts.token_string or ""]

    def load(self, path: str) -> None:
        keys = list(self.rows)
        found = bundled_rows(path, keys).get(self.opts.token_string or "")
        if found is None:  # a file of its own
            super().load(path)
            return
        with torch.no_grad():
            for key in keys:
                self.rows[key].copy_(found[key])

    def bundle(self) -> dict[str, torch.Tensor]:
        """What the adapter's file holds of the word."""
        return bundle_of(self.opts.token_string or "", self.file_tensors()) if self.opts.is_bundled else {}


class WordFile(Hook):
    """Writes the file of the word beside that of the adapter, `<name>-<word>`, and one of its average where there is
    one."""

    def __init__(self, word: AddedWord, has_average: bool) -> None:
        super().__init__()
        self.word = word
        endings = word.opts.companions
        averaged = [f"{ending}{AVERAGED}" for ending in endings] if has_average else []
        self.companions = (*endings, *averaged)  # type: ignore[misc]  # of this run

    def save_companion(
        self, run: Run, ending: str, path: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        own = {key: text for key, text in metadata.items() if not key.startswith("ss_network_")}
        name = "modelspec.architecture"
        if name in own:
            own[name] = f"{own[name].rpartition('/')[0]}/textual-inversion"
        with run.weights_for_eval(averaged=ending.endswith(AVERAGED)):
            write_adapter_file(path, self.word.file_tensors(), dtype, own)


def unused_words(path: str | None, token: str | None) -> list[Ignored]:
    """Words in the file of --network_weights that this run does not go on with."""
    return [
        Ignored(
            f"the word '{word}' in --network_weights {path}",
            f"is left out of the run and of its files: --token_string {word} goes on with it",
        )
        for word in bundled_rows(path or "")
        if word != token
    ]

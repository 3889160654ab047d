"""Textual inversion: vectors of words that text encoders did not know are what is learned. Its options."""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.core.errors import Problems
from library.core.options import Config, option
from library.families.record import FamilyRecord


@dataclass(frozen=True, kw_only=True)
class TextualInversionOptions:
    """New word (textual inversion)"""

    token_string: str | None = option(
        None, help="the new word, as it stands in captions and prompts; one that no tokenizer has as a single token"
    )
    num_vectors_per_token: int = option(1, help="vectors that stand for the word, each like one token", most=1000)
    init_word: str | None = option(
        None, help="known word, or several, whose vectors the new ones start from; random ones when not given"
    )
    weights: str | None = option(None, help="embedding file to start from: .safetensors, .pt or .bin")
    use_object_template: bool = option(
        False, help="replace every caption by one of 27 sentences about a thing, drawn at random; without captions"
    )
    use_style_template: bool = option(
        False, help="replace every caption by one of 19 sentences about a style, drawn at random; without captions"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        if self.token_string is not None and len(self.token_string.split()) != 1:
            problems.add(f"--token_string is '{self.token_string}'; needed: one word without blanks")
        if self.num_vectors_per_token < 1:
            problems.add(f"--num_vectors_per_token is {self.num_vectors_per_token}; needed: at least 1")
        if self.use_object_template and self.use_style_template:
            problems.add("--use_object_template and --use_style_template are set; give one of the two templates")
        problems.raise_if_any()

    @property
    def words(self) -> list[str]:
        """The words of the vectors: `zyx zyx1 zyx2`."""
        return words_of(self.token_string or "", self.num_vectors_per_token)


@dataclass(frozen=True, kw_only=True)
class AddedWordOptions(TextualInversionOptions):
    """New word beside the adapter (textual inversion)"""

    token_string: str | None = option(
        None,
        help="new word that is learned together with the adapter, as it stands in captions and prompts; one that no "
        "tokenizer has as a single token",
    )
    weights: str | None = option(
        None,
        help="embedding file that the word starts from: .safetensors, .pt or .bin; that of --network_weights when not "
        "given and there",
    )
    embedding_lr: float | None = option(
        None, help="rate of the word's vectors; --learning_rate when not given, 0 = they stay as they are"
    )
    embedding_files: str = option(
        "both",
        help="where the vectors are written: bundle = into the adapter's file, separate = into a file of their own "
        "beside it, or both",
        choices=("both", "bundle", "separate"),
    )

    def __post_init__(self) -> None:
        problems = Problems()
        problems.attempt(super().__post_init__)
        if self.embedding_lr is not None and not 0 <= self.embedding_lr < float("inf"):
            problems.add(f"--embedding_lr is {self.embedding_lr}; needed: 0 or more")
        if self.token_string and "." in self.token_string and self.is_bundled:
            problems.add(
                f"--token_string is '{self.token_string}'; a word in an adapter's file cannot have a dot: choose "
                "another, or give --embedding_files separate"
            )
        problems.raise_if_any()

    @property
    def is_bundled(self) -> bool:
        return self.embedding_files != "separate"

    @property
    def companions(self) -> tuple[str, ...]:
        """Ending of the word's own file: `-zyx` for `<name>-zyx.safetensors`."""
        if not self.token_string or self.embedding_files == "bundle":
            return ()
        return ("-" + re.sub(r"[^\w-]", "_", self.token_string),)


def learned_word(config: Config) -> str | None:
    """The word that a run learns, alone or beside an adapter."""
    groups = (TextualInversionOptions, AddedWordOptions)
    return next((config[group].token_string or None for group in groups if group in config), None)


def groups_beside_adapter(record: FamilyRecord) -> tuple[type, ...]:
    """Groups of options that a script for adapters has beside those of adapters."""
    return (AddedWordOptions,) if record.embedding_keys else ()


def foreign_options(record: FamilyRecord, trainable: str) -> dict[str, str]:
    """Shared options that the known scripts do not have: name -> reason."""
    names = ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate")
    vae = "the VAE stays in the format of --mixed_precision, as in the known script"
    return {
        **({"no_half_vae": vae} if trainable == "textual_inversion_xti" else {}),
        **dict.fromkeys(names, "a caption without the new word teaches nothing about it"),
        "skip_until_initial_step": "a run begins at --initial_step without loading what lies before it",
    }


def words_of(token: str, count: int) -> list[str]:
    """Each vector of a word has a word of its own: the word itself, then with the numbers from 1."""
    return [token, *(f"{token}{number}" for number in range(1, count))]

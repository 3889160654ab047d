"""What families share: options without meaning, by objective."""

from __future__ import annotations

import pytest

from library.core.errors import ConfigError
from library.training.option_reader import Script
from library.training.parser_common import parse_script, script
from library.training.wiring.base import foreign_to_ddpm, ignored_by_flow

WHOLE = script("flux", "network")


def with_table(kind: str, table: dict[str, str]) -> Script:
    return Script("any", "network", WHOLE.classes, refused={}, defaults={}, **{kind: table})


@pytest.mark.parametrize("kind, table", [("ignored", ignored_by_flow("Any")), ("foreign", foreign_to_ddpm("Any"))])
def test_names_without_meaning_are_options_and_pass_with_their_defaults(kind, table):
    assert set(table) <= set(WHOLE.owners)
    words = [f"--{name}={WHOLE.default(name)}" for name in table if WHOLE.default(name) not in (None, False)]
    config = parse_script(words, with_table(kind, table)).config
    assert config.explicit == frozenset() and config.ignored == ()


def test_settings_of_the_other_objective_are_refused_or_ignored_by_name():
    with pytest.raises(ConfigError) as error:
        parse_script(
            ["--timestep_sampling=shift", "--discrete_flow_shift=2"], with_table("foreign", foreign_to_ddpm("Any"))
        )
    assert len(error.value.problems) == 2 and "Any is trained at whole timesteps" in str(error.value)
    (item,) = parse_script(["--min_snr_gamma=5"], with_table("ignored", ignored_by_flow("Any"))).config.ignored
    assert item.written == "--min_snr_gamma 5" and "no table of signal-to-noise ratios" in item.reason

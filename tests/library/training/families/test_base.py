"""What families share: refusals by objective."""

from __future__ import annotations

import pytest

from library.errors import ConfigError
from library.training.families.base import refused_by_ddpm, refused_by_flow
from library.training.parser_common import Script, parse_script, script

WHOLE = script("flux", "network")


def refusing(refused: dict[str, str]) -> Script:
    return Script("any", "network", WHOLE.classes, refused=refused, defaults={})


@pytest.mark.parametrize("table", [refused_by_flow("Any"), refused_by_ddpm("Any")])
def test_refused_names_are_options_and_pass_with_their_defaults(table):
    assert set(table) <= set(WHOLE.owners)
    words = [f"--{name}={WHOLE.default(name)}" for name in table if WHOLE.default(name) not in (None, False)]
    assert parse_script(words, refusing(table)).config.explicit == frozenset()


def test_settings_of_the_other_objective_are_refused_by_name():
    with pytest.raises(ConfigError) as error:
        parse_script(["--timestep_sampling=shift", "--discrete_flow_shift=2"], refusing(refused_by_ddpm("Any")))
    assert len(error.value.problems) == 2 and "Any is trained at whole timesteps" in str(error.value)
    with pytest.raises(ConfigError, match="--min_snr_gamma is 5.0; .* no table of signal-to-noise ratios"):
        parse_script(["--min_snr_gamma=5"], refusing(refused_by_flow("Any")))

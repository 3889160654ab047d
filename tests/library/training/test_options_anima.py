"""Values of options that anima_train_network.py does not take."""

import pytest

from library.core.errors import ConfigError
from library.training.parser_common import parse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vae_chunk_size=3"], "an even number"), (["--vae_chunk_size=0"], "an even number"),
        (["--mlp_lr=-1"], "0 or more"),
        (["--t5_max_token_length=0"], "1 or more"), (["--weighted_captions"], "not possible"),
    ],
)  # fmt: skip
def test_what_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words, "anima", "network")


def test_another_spelling_of_shared_options_sets_them():
    config = parse(["--unsloth_offload_checkpointing"], "anima", "network")
    assert config.value("gradient_checkpointing") and config.value("cpu_offload_checkpointing")
    assert not parse([], "anima", "network").value("gradient_checkpointing")

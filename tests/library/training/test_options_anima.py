"""Values of options that anima_train_network.py does not take."""

import pytest

from library.errors import ConfigError
from library.training.parser_common import parse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unsloth_offload_checkpointing"], "--gradient_checkpointing --cpu_offload_checkpointing"),
        (["--vae_chunk_size=3"], "an even number"), (["--vae_chunk_size=0"], "an even number"), (["--mlp_lr=-1"], "0 or more"),
        (["--t5_max_token_length=0"], "1 or more"), (["--noise_offset=0.1"], "flow matching"), (["--v2"], "Stable Diffusion"),
    ],
)  # fmt: skip
def test_what_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words, "anima", "network")

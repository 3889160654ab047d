"""What programs that call flux_train_network.py get from its parser."""

from library.training import cli
from library.training.parser_common import script

SCRIPT = script("flux", "network")


def test_setup_parser_gives_a_namespace_with_every_option():
    namespace = cli.build_parser("flux", "network").parse_args(["--network_dim", "8", "--cache_latents"])
    assert set(SCRIPT.owners) <= set(vars(namespace))
    assert (namespace.network_dim, namespace.cache_latents, namespace.max_train_steps) == (8, True, 1600)

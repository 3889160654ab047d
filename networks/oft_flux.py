"""OFT for FLUX.1 under the name that sd-scripts has for it; the target tables tell the families apart."""

from networks.oft import KIND, check_network_args, create_network, create_network_from_weights

__all__ = ["KIND", "check_network_args", "create_network", "create_network_from_weights"]

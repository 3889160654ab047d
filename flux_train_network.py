"""Train a LoRA-type network for FLUX.1."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="flux", trainable="network")


if __name__ == "__main__":
    cli.main(family="flux", trainable="network")

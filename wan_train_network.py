"""Train a LoRA-type network for Wan 2.1 or 2.2."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="wan", trainable="network")


if __name__ == "__main__":
    cli.main(family="wan", trainable="network")

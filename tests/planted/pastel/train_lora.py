"""Train a LoRA-type network for Pastel."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="pastel", trainable="network")


if __name__ == "__main__":
    cli.main(family="pastel", trainable="network")

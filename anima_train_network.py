"""Train a LoRA-type network for Anima."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="anima", trainable="network")


if __name__ == "__main__":
    cli.main(family="anima", trainable="network")

"""Train a LoRA-type network for FramePack."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="framepack", trainable="network")


if __name__ == "__main__":
    cli.main(family="framepack", trainable="network")

"""Train a LoRA-type network for Stable Diffusion 1 and 2."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sd", trainable="network")


if __name__ == "__main__":
    cli.main(family="sd", trainable="network")

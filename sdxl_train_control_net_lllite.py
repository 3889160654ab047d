"""Train a ControlNet-LLLite for SDXL: small networks in its attention that follow control pictures."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sdxl", trainable="lllite")


if __name__ == "__main__":
    cli.main(family="sdxl", trainable="lllite")

"""Old name of sdxl_train_control_net_lllite.py."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sdxl", trainable="lllite")


if __name__ == "__main__":
    cli.main(family="sdxl", trainable="lllite")

"""The old name of train_control_net.py."""

from train_control_net import setup_parser  # noqa: F401

from library.training import cli

if __name__ == "__main__":
    cli.main(family="sd", trainable="control_net")

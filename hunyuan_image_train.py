"""Train a whole HunyuanImage 2.1 denoiser."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="hunyuan_image", trainable="full")


if __name__ == "__main__":
    cli.main(family="hunyuan_image", trainable="full")

"""Make videos with HunyuanVideo and SkyReels V1, with and without LoRAs."""

from library.generation import hunyuan_video_inference


def setup_parser():
    return hunyuan_video_inference.build_parser()


if __name__ == "__main__":
    hunyuan_video_inference.main()

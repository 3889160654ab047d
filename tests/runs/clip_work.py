"""Runs on videos beside pictures."""

from __future__ import annotations

from pathlib import Path

from tests.runs.conftest import Work
from tests.tiny_clips import write_moving_shapes

CLIPS = """
[general]
caption_extension = ".txt"
resolution = [64, 64]
batch_size = {batch_size}
enable_bucket = true
bucket_no_upscale = true
[[datasets]]
video_directory = '{videos}'
target_frames = [1, 5, 9]
frame_extraction = "head"
{keys}
[[datasets]]
image_directory = '{images}'
"""



class ClipWork(Work):
    """Videos beside pictures."""

    def clips(self, batch_size: int = 2, keys: str = "", count: int = 3, name: str = "clips.toml") -> Path:
        videos, path = self.folder / "videos", self.folder / name
        if not videos.exists():
            write_moving_shapes(videos, count)
        text = CLIPS.format(batch_size=batch_size, videos=videos, images=self.images, keys=keys)
        path.write_text(text, encoding="utf-8")
        return path

    def alone(self, out: str, *more: str, dataset: Path) -> list[str]:
        """The command line of a run that has caches and no other files than those of the denoiser."""
        beside = ("--vae", "--text_encoder", "--t5", "--clip", "--image_encoder", "--live")
        return [word for word in self.argv(out, *more, dataset=dataset) if not word.startswith(beside)]

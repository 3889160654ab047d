"""A pipeline of clips with its text encoders, which may be gone when the clips are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from library.generation.pipeline import PictureMaker
from library.generation.sampling_utils import Conditioning
from library.generation.video_requests import VideoRequest

Texts = tuple[tuple[tuple[str, ...], ...], str | None]


@dataclass
class VideoMaker(PictureMaker[VideoRequest]):
    """What a request's texts are encoded to is kept, by the prompts and the negative text together."""

    known: dict[Texts, tuple[Conditioning, Conditioning | None]] = field(default_factory=dict)
    known_further: dict[tuple[str, str], Conditioning] = field(default_factory=dict)

    def conditioning(self, request: VideoRequest) -> tuple[Conditioning, Conditioning | None]:
        key = (request.rows, request.negative_text)
        if key not in self.known:
            self.known[key] = super().conditioning(request)
        return self.known[key]

    def further(self, request: VideoRequest) -> dict[str, Conditioning]:
        texts = request.further_texts
        if not texts.items() <= self.known_further.keys():
            made = super().further(request)
            self.known_further |= {(name, text): made[name] for name, text in texts.items()}
        return {name: self.known_further[name, text] for name, text in texts.items()}

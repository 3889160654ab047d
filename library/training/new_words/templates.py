"""Sentences that stand for captions in textual inversion; {} is the new word."""

OBJECT = (
    "a photo of {}", "a picture of one {}", "a clear photo of {}", "a sharp photo of {}", "a blurred photo of {}",
    "a bright photo of {}", "a dark photo of {}", "a close view of {}", "{} seen from afar", "a cropped picture of {}",
    "{} in the middle of the picture", "{} at the edge of the picture", "a small {}", "a large {}", "a clean {}",
    "a worn {}", "a new {}", "an odd {}", "a fine {}", "my {}", "the {} over there", "a snapshot of {}",
    "a studio photo of {}", "an old photo of {}", "a drawing of {}", "a print that shows {}",
    "a picture with nothing but {}",
)  # fmt: skip
"""27 about a thing"""

STYLE = (
    "a painting in the style of {}", "a drawing in the style of {}", "a picture in the style of {}",
    "a sketch in the manner of {}", "an illustration in the style of {}", "a poster in the style of {}",
    "a landscape in the style of {}", "a portrait in the style of {}", "a still life in the style of {}",
    "a bright picture in the style of {}", "a dark picture in the style of {}", "a close view in the style of {}",
    "a small painting in the style of {}", "a large painting in the style of {}", "a detail painted in the style of {}",
    "a clean drawing in the manner of {}", "a rough drawing in the manner of {}", "an odd picture in the manner of {}",
    "a fine picture in the manner of {}",
)  # fmt: skip
"""19 about a style"""

"""The making of the embedded tiny base: drawn scenes with captions, small vocabularies, and the two training loops."""

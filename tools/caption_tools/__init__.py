"""The inside of the tools for captions, tags and metadata files."""

"""Scripts for captions and metadata of datasets."""

"""What everything else stands on: options, errors, registry, keyed random numbers, text and atomic files."""

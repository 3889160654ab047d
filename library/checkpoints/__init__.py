"""Files of models: what they are, how they are read, identified, converted and described."""

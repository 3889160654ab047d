"""Files of adapters: names, layouts, conversion, layers of the models that they belong to."""

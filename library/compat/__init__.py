"""Names by which scripts, notebooks and forks of other trainers call this project, with the parameters that they know.

Thin layers: each turns its arguments into our own objects and calls the place that does the work. Nothing else in the
project imports from here; the modules at the known paths (`library.train_util`, `networks.lora`, ...) hand the names
on. docs/public_names.md lists them.
"""

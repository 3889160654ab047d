"""What notebooks and plug-ins use of the library, under short names; each is looked up when it is asked for.

    import library

    training = library.Training(family="...", network_module="lora", ...)      # see library/training/notebook.py
    training.step()

    @library.LOSSES.register("my_loss")                    # see docs/plugins.md
    def my_loss(options, prediction, target, timesteps, objective): ...
"""

from library.core.lazy_names import lazy_names

_NAMES = {
    "Training": "library.training.notebook:Training",
    "Trainable": "library.training.trainables.base:Trainable",
    "Hook": "library.training.hooks.base:Hook",
    "FamilyRecord": "library.families.record:FamilyRecord",
    "register_family": "library.families.registry:register_family",
    "register_kind": "networks.kinds.registry:register_kind",
    "build_tiny": "library.tiny_models:build_tiny",
    "option": "library.core.options:option",
    "ConfigError": "library.core.errors:ConfigError",
    "LOSSES": "library.training.losses:LOSSES",
    "LOSS_WEIGHTS": "library.training.loss_weights:LOSS_WEIGHTS",
    "TIMESTEP_SAMPLERS": "library.training.timestep_samplers:TIMESTEP_SAMPLERS",
    "INFERENCE_SAMPLERS": "library.training.inference_samplers:INFERENCE_SAMPLERS",
    "SCHEDULERS": "library.training.schedulers:SCHEDULERS",
    "OPTIMIZERS": "library.training.optimizers:OPTIMIZERS",
    "TRAINABLES": "library.training.parser_common:TRAINABLES",
}

__getattr__, __dir__ = lazy_names(__name__, _NAMES)

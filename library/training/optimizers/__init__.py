"""Optimizers: the options, the table of names, the checks at start and `build`.

Nothing heavy is imported before a name is chosen. `choose` says what a name stands for without importing it, `check`
imports it and looks at the arguments, `build` makes the optimizer.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError, Problems, did_you_mean
from library.core.options import Ignored, option, without_effect
from library.core.registry import Registry, is_path
from library.training.keyword_args import argument_problems, names_read, parse_keyword_args

if TYPE_CHECKING:
    import torch

OPTIMIZERS: Registry[type] = Registry("optimizer", option="optimizer_type", group="optimizers")
"""info: `defaults` are arguments set when absent, `forced` ones always."""
OPTIMIZERS.add("AdamW", "torch.optim:AdamW")
OPTIMIZERS.add("SGDNesterov", "torch.optim:SGD", defaults={"momentum": 0.9}, forced={"nesterov": True})
for _name in ("AdamW8bit", "Lion8bit", "PagedLion8bit", "PagedAdamW8bit", "PagedAdamW", "PagedAdamW32bit"):
    OPTIMIZERS.add(_name, f"bitsandbytes.optim:{_name}", package="bitsandbytes")
OPTIMIZERS.add(
    "SGDNesterov8bit", "bitsandbytes.optim:SGD8bit", package="bitsandbytes",
    defaults={"momentum": 0.9}, forced={"nesterov": True},
)
OPTIMIZERS.add("Lion", "lion_pytorch:Lion", package="lion-pytorch")
for _name in ("DAdaptation", "DAdaptAdamPreprint"):
    OPTIMIZERS.add(_name, "dadaptation.experimental:DAdaptAdamPreprint", package="dadaptation")
OPTIMIZERS.add("DAdaptAdanIP", "dadaptation.experimental:DAdaptAdanIP", package="dadaptation")
for _name in ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"):
    OPTIMIZERS.add(_name, f"dadaptation:{_name}", package="dadaptation")
OPTIMIZERS.add("Prodigy", "prodigyopt:Prodigy", package="prodigyopt")
OPTIMIZERS.add("AdaFactor", "transformers.optimization:Adafactor", defaults={"relative_step": True})
for _name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"):
    OPTIMIZERS.add(_name, f"schedulefree:{_name}", package="schedulefree")
OPTIMIZERS.add("ProdigyPlusScheduleFree", "prodigyplus:ProdigyPlusScheduleFree", package="prodigy-plus-schedule-free")
OPTIMIZERS.add("CAME", "came_pytorch:CAME", package="came-pytorch")
for _name in ("AdEMAMix8bit", "PagedAdEMAMix8bit", "Adam8bit", "PagedAdam8bit"):
    OPTIMIZERS.add(_name, f"bitsandbytes.optim:{_name}", package="bitsandbytes")
for _name in (
    "AdaBelief", "Adan", "AdamP", "AdEMAMix", "ADOPT", "EmoFact", "EmoLynx", "EmoNavi", "FAdam", "Grams", "Lamb",
    "LaProp", "MARS",
    "Ranger", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD", "SGDSaI", "SimplifiedAdEMAMix", "SOAP",
    "StableAdamW", "Tiger", "Yogi",
):  # fmt: skip
    OPTIMIZERS.add(_name, f"pytorch_optimizer:{_name}", package="pytorch-optimizer")
_OWN = "library.training.optimizers."
OPTIMIZERS.add("Automagic", _OWN + "automagic:Automagic")
OPTIMIZERS.add("Automagic_v2", _OWN + "automagic:AutomagicV2")
OPTIMIZERS.add("SOAP_sf", _OWN + "soap_schedule_free:SOAPScheduleFree", package="pytorch-optimizer")
OPTIMIZERS.add(
    "Prodigy_plus_schedulefree", "prodigyplus:ProdigyPlusScheduleFree", package="prodigy-plus-schedule-free"
)

PACKAGES = {
    "lion_pytorch": "lion-pytorch", "prodigyplus": "prodigy-plus-schedule-free",
    "pytorch_optimizer": "pytorch-optimizer",
    "came_pytorch": "came-pytorch",
}
"""import name -> name to install, where they differ"""
ADAFACTOR = "transformers.optimization.Adafactor"
MOVES_RATES = tuple(_OWN + f"automagic.{name}" for name in ("Automagic", "AutomagicV2"))
"""classes that move the rates of their weights themselves, from --learning_rate on"""
UNUSABLE = {
    "torch.optim.LBFGS": "it evaluates the loss several times per step",
    "torch.optim.SparseAdam": "it takes sparse gradients only",
    "torch.optim.Optimizer": "it is the base class of the optimizers",
}
TOO_LOW_FOR_ADAPTIVE = 0.1
FUSED = ("torch.optim.Adam", "torch.optim.AdamW")
"""classes with a kernel that moves many weights in one call, on `FUSED_DEVICES`; that of SGD wants that either all
weights have moved before or none, which adapters with parts that stand still do not keep"""
FUSED_DEVICES = ("cpu", "cuda")
OTHER_WAYS = ("fused", "foreach", "capturable", "differentiable")
"""arguments of theirs that choose a way of computing"""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and gradient clipping."""

    optimizer_type: str = option(
        "", help="AdamW when empty; a name of the table (" + ", ".join(OPTIMIZERS.names()) + "),"
        " another class of torch.optim, or a dotted class path",
    )
    use_8bit_adam: bool = option(False, help="old spelling of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, help="old spelling of --optimizer_type Lion")
    learning_rate: float = option(2e-6, help="rate of every part that has no rate of its own")
    max_grad_norm: float = option(1.0, help="largest norm of all gradients together; 0 = no clipping")
    optimizer_args: list[str] | None = option(
        None, nargs="*", metavar="KEY=VALUE", help='arguments of the optimizer, e.g. weight_decay=0.01 betas=0.9,0.999'
    )
    fused_backward_pass: bool = option(False, help="update each parameter inside the backward pass")
    offload_optimizer: bool = option(
        False, help="keep the states of the optimizer (moments) in main memory between its steps; results stay the same"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        if self.use_8bit_adam and self.use_lion_optimizer:
            problems.add(
                "--use_8bit_adam and --use_lion_optimizer are exclusive; use --optimizer_type AdamW8bit or Lion alone"
            )
        for flag in ("use_8bit_adam", "use_lion_optimizer"):
            if getattr(self, flag) and self.optimizer_type:
                problems.add(f"--{flag} and --optimizer_type {self.optimizer_type} are exclusive; leave out --{flag}")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
                problems.add(f"--{name} is {value!r}; 0 or a positive number is needed")
        try:
            parse_keyword_args(self.optimizer_args, "optimizer_args")
        except ConfigError as error:
            problems.absorb(error)
        problems.raise_if_any()


@dataclass(frozen=True)
class OptimizerChoice:
    """What the options stand for: a class, as text, and the arguments it will get besides parameters and rates."""

    class_path: str
    kwargs: dict[str, Any]
    """in the order of the user's, absent defaults after them; with the forced ones"""
    recorded: dict[str, Any]
    """without the forced ones: for `ss_optimizer`"""
    name: str
    package: str | None = None

    @property
    def class_name(self) -> str:
        return self.class_path.rpartition(".")[2]

    @property
    def one_rate_for_all_groups(self) -> bool:
        """D-Adaptation and Prodigy estimate one step size for all groups; they read the first group's rate only."""
        return self.class_name.lower().startswith(("dadapt", "prodigy"))

    @property
    def named_schedule_free(self) -> bool:
        """Whether the name promises schedule-free training; the built instance decides
        (`OptimizerBuild.schedule_free`)."""
        name = self.class_name.lower()
        return name.endswith("schedulefree") or name.startswith("schedulefree")

    @property
    def moves_own_rates(self) -> bool:
        return self.class_path in MOVES_RATES

    @property
    def no_schedule(self) -> str | None:
        """Why --lr_scheduler is not read; None where it is, and for Adafactor with relative_step, which has one of its
        own."""
        if self.moves_own_rates:
            return f"{self.name} moves its learning rates itself"
        return f"{self.name} has no learning rate schedule" if self.named_schedule_free else None

    @property
    def is_adafactor(self) -> bool:
        return self.class_path == ADAFACTOR

    @property
    def finds_own_rate(self) -> bool:
        """Adafactor with relative_step: no rate is given, it follows from the step and the size of each parameter."""
        return self.is_adafactor and bool(self.kwargs.get("relative_step"))


@dataclass(frozen=True)
class OptimizerBuild:
    """An optimizer and what the rest of a run wants to know of it."""

    optimizer: torch.optim.Optimizer
    choice: OptimizerChoice
    class_path: str
    """module.Class of the instance, e.g. torch.optim.adamw.AdamW"""
    args_text: str
    notices: list[str] = field(default_factory=list)

    @property
    def metadata_text(self) -> str:
        """For `ss_optimizer`: module.Class(k=v,...), without parentheses when there are no arguments."""
        return f"{self.class_path}({self.args_text})" if self.args_text else self.class_path

    @property
    def schedule_free(self) -> bool:
        return switches_weights(self.optimizer)


def switches_weights(optimizer: Any) -> bool:
    """Whether an optimizer keeps other weights for evaluation: it has callable train and eval, whatever its name.

    accelerate's wrapper, around every optimizer under fp16, has both for all and hands them on: the wrapped one
    decides.
    """
    if type(optimizer).__module__ == "accelerate.optimizer":
        optimizer = optimizer.optimizer
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def choose(options: OptimizerOptions) -> OptimizerChoice:
    """What the options stand for, without importing it. Names of the table in any case, other names as written."""
    name = options.optimizer_type.strip() or "AdamW"
    if options.use_8bit_adam:
        name = "AdamW8bit"
    elif options.use_lion_optimizer:
        name = "Lion"
    if is_path(name):
        name = name.replace(":", ".")
    kwargs = parse_keyword_args(options.optimizer_args, "optimizer_args")
    if name in OPTIMIZERS:
        entry = OPTIMIZERS.entry(name)
        recorded = {**kwargs, **{k: v for k, v in entry.info.get("defaults", {}).items() if k not in kwargs}}
        if kwargs.get("warmup_init") and entry.name == "AdaFactor":
            recorded["relative_step"] = True
        forced = entry.info.get("forced", {})
        recorded = {key: value for key, value in recorded.items() if key not in forced}
        return OptimizerChoice(
            entry.target.replace(":", "."), {**recorded, **forced}, recorded, entry.name, entry.package
        )
    if "." in name:
        top = name.partition(".")[0]
        if name == ADAFACTOR:
            kwargs["relative_step"] = bool(kwargs.get("warmup_init")) or kwargs.get("relative_step", True)
        return OptimizerChoice(name, kwargs, dict(kwargs), name, PACKAGES.get(top, top))
    return OptimizerChoice(f"torch.optim.{name}", kwargs, dict(kwargs), name)


def _nearest(choice: OptimizerChoice) -> str:
    """For messages: what every torch has in the place of an optimizer with 8-bit or paged states."""
    if choice.package != "bitsandbytes":
        return ""
    if "SGD" in choice.name:
        return "; the nearest that is there is SGDNesterov, whose states take four times the memory"
    return (
        "; the nearest that are there: AdamW with --offload_optimizer, whose states wait in main memory, and AdaFactor,"
        " whose states take less"
    )


def _lacks_package(choice: OptimizerChoice, package: str) -> str:
    others = {OPTIMIZERS.entry(name).package for name in OPTIMIZERS.names()} - {None, "bitsandbytes"}
    all_of_them = ", or all of these packages with: pip install -e .[optimizers]" if package in others else ""
    return (
        f"--optimizer_type {choice.name} needs the package {package}, which is not installed;"
        f" install it with: pip install {package}{all_of_them}{_nearest(choice)}"
    )


def optimizer_class(choice: OptimizerChoice) -> type:
    """Import the class. ConfigError with the nearest name, or with the package to install."""
    module_name, _, class_name = choice.class_path.rpartition(".")
    top = module_name.partition(".")[0]
    if choice.class_path in UNUSABLE:
        raise ConfigError(f"--optimizer_type {choice.name} cannot be used here: {UNUSABLE[choice.class_path]}")
    if importlib.util.find_spec(top) is None:
        raise ConfigError(_lacks_package(choice, choice.package or PACKAGES.get(top, top)))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if choice.package and PACKAGES.get(error.name or "", error.name) == choice.package:
            raise ConfigError(_lacks_package(choice, choice.package)) from error
        raise ConfigError(f"--optimizer_type {choice.name}: {module_name} cannot be imported ({error})") from error
    except Exception as error:  # whatever a module of the user's raises
        raise ConfigError(f"--optimizer_type {choice.name}: {module_name} cannot be imported ({error})") from error
    found = getattr(module, class_name, None)
    if isinstance(found, type):
        return found
    if module_name == "torch.optim" and "." not in choice.name:
        from torch.optim import Optimizer

        known = OPTIMIZERS.names() + [
            name for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
        ]
        known = list(dict.fromkeys(known))
        raise ConfigError(
            f"unknown optimizer '{choice.name}' (--optimizer_type){did_you_mean(choice.name, known) or '.'}"
            f" Known: {', '.join(known)}, or a dotted class path. Names of torch.optim are case-sensitive"
        )
    names = [name for name, value in vars(module).items() if isinstance(value, type)]
    raise ConfigError(
        f"--optimizer_type is '{choice.name}'; {module_name} has no class {class_name}{did_you_mean(class_name, names)}"
    )


def check(options: OptimizerOptions) -> OptimizerBuild:
    """Import the class, compare the arguments with its signature and try them on a small matrix, which is returned;
    ConfigError with every problem."""
    choice = choose(options)
    cls = optimizer_class(choice)
    problems = argument_problems(
        cls, choice.kwargs, "optimizer_args", supplied=("params", "lr"), what=choice.name,
        further=names_read(cls) if choice.package == PACKAGES["pytorch_optimizer"] else None,
    )
    if problems:
        raise ConfigError(problems)
    from torch import nn, zeros

    return build(options, [{"params": [nn.Parameter(zeros(2, 2))], "lr": options.learning_rate, "name": "probe"}])


def check_rates(
    options: OptimizerOptions, rates: Sequence[float],
    named: str = "--learning_rate, --unet_lr and --text_encoder_lr",
) -> None:
    """`named`: the options that set them. ConfigError when the optimizer refuses groups of these rates, as those that estimate one step size for all groups
    do in their first step."""
    different = sorted({rate for rate in rates if rate})
    if len(different) < 2 or not choose(options).one_rate_for_all_groups:
        return
    from torch import nn, ones

    weights = [nn.Parameter(ones(2, 2)) for _ in different]
    built = build(
        options,
        [{"params": [weight], "lr": rate, "name": str(rate)} for weight, rate in zip(weights, different, strict=True)],
    )
    for weight in weights:
        weight.grad = ones(2, 2)
    try:
        built.optimizer.step()
    except RuntimeError as error:
        raise ConfigError(
            f"--optimizer_type {built.choice.name} takes one learning rate for all parts, or 0;"
            f" {named} ask for {' and '.join(map(str, different))} ({error}). Give one rate, usually 1"
        ) from error


def check_offload(options: OptimizerOptions, built: OptimizerBuild) -> None:
    """ConfigError for --offload_optimizer with an optimizer that reads its states between steps."""
    if options.offload_optimizer and built.schedule_free:
        raise ConfigError(
            f"--offload_optimizer is set with --optimizer_type {built.choice.name}, which makes the weights of samples"
            " and files of its states (schedule-free), so that these stay on the device; leave --offload_optimizer out, or"
            " choose another optimizer, AdamW say"
        )


def idle(options: OptimizerOptions) -> list[Ignored]:
    """What the chosen optimizer, or the device, leaves without effect."""
    if not options.offload_optimizer:
        return []
    choice = choose(options)
    if choice.class_name.startswith("Paged"):
        reason = f"the states of {choice.name} are paged, and wait in main memory by themselves"
        return without_effect(["offload_optimizer"], reason)
    from library.device_utils import get_preferred_device

    if get_preferred_device().type != "cpu":
        return []
    return without_effect(["offload_optimizer"], "the run computes in main memory")


def check_float16(options: OptimizerOptions) -> None:
    """ConfigError when the optimizer makes float16 weights (--full_fp16) not-a-number that have no gradient yet, as the
    first matrices of adapters do: Adam divides by sqrt(v) + eps, and a small eps is 0 in float16."""
    from torch import float16, nn, zeros

    try:
        weight = nn.Parameter(zeros(2, 2, dtype=float16))
        built = build(options, [{"params": [weight], "lr": options.learning_rate, "name": "probe"}])
        weight.grad = zeros(2, 2, dtype=float16)
        built.optimizer.step()
    except Exception:  # an optimizer that does not run on the CPU cannot be tried; what `check` finds is told there
        return
    if not bool(weight.isfinite().all()):
        raise ConfigError(
            f"--full_fp16 with --optimizer_type {built.choice.name}: weights without gradient become not-a-number, "
            "because its eps"
            " is 0 in float16; add --optimizer_args eps=1e-4, or leave --full_fp16 out (--mixed_precision fp16 alone "
            "keeps the"
            " trained weights in float32)"
        )


def build(
    options: OptimizerOptions, param_groups: Sequence[Mapping[str, Any]], *, fused: bool = False
) -> OptimizerBuild:
    """Make the optimizer for groups with `params`, `lr` and `name`. `fused`: it may move many weights in one kernel.

    Raises ConfigError when nothing is trained or an argument is refused by the optimizer.
    """
    choice = choose(options)
    cls = optimizer_class(choice)
    groups = [dict(group, params=list(group["params"])) for group in param_groups]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError(
            "there is nothing to train: every weight is left out or has a learning rate of 0; look at the options that "
            "give parts, blocks and layers their rates, and at those that leave parts out"
        )
    rate: float | None = options.learning_rate
    if choice.finds_own_rate:
        rate = None
        for group in groups:
            group.pop("lr", None)
    from library.training.optimizers.untraced import leave_compiler_out

    leave_compiler_out(cls)
    try:
        optimizer = cls(groups, lr=rate, **choice.kwargs, **(_fused_argument(choice, groups) if fused else {}))
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value}" for key, value in choice.kwargs.items())
        if not given:
            raise ConfigError(
                f"--optimizer_type {choice.name} cannot be made of parameter groups and lr: {error}; needed: a class "
                "like those of torch.optim"
            ) from error
        raise ConfigError(
            f"--optimizer_args is {given}, which {choice.name} refuses: {error}; needed: values of the form that it "
            "documents"
        ) from error
    missing = [name for name in ("param_groups", "step", "zero_grad", "state_dict") if not hasattr(optimizer, name)]
    if missing:
        raise ConfigError(
            f"--optimizer_type {choice.name} has no {', '.join(missing)}; needed: a class like those of torch.optim"
        )
    if switches_weights(optimizer):
        optimizer.train()
    args_text = ",".join(f"{key}={value}" for key, value in choice.recorded.items())
    notices = log_lines(choice)
    if any(group.get("weight_decay") == 0 for group in groups) and not getattr(optimizer, "defaults", {}).get("weight_decay"):
        notices.append(
            f"excludes_weight_decay has no effect: weight_decay of {choice.name} is 0; --optimizer_args weight_decay=0.01"
            " sets it"
        )
    return OptimizerBuild(optimizer, choice, f"{cls.__module__}.{cls.__qualname__}", args_text, notices)


def _fused_argument(choice: OptimizerChoice, groups: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Switches the fused kernel on where the class has one for these weights and the user chose no other way. It is no
    setting of the run: neither recorded nor, when a run goes on, different from what its state says."""
    if choice.class_path not in FUSED or any(name in choice.kwargs for name in OTHER_WAYS):
        return {}
    weights = [weight for group in groups for weight in group["params"]]
    fits = all(weight.device.type in FUSED_DEVICES and weight.is_floating_point() for weight in weights)
    return {"fused": True} if fits else {}


def log_lines(choice: OptimizerChoice) -> list[str]:
    """What is to be said once about a choice."""
    lines = []
    if choice.class_path == "bitsandbytes.optim.SGD8bit" and choice.kwargs.get("nesterov"):
        lines.append(
            "SGDNesterov8bit: nesterov=True is passed on, but bitsandbytes has plain momentum only and ignores it"
        )
    if choice.finds_own_rate:
        lines.append(
            "AdaFactor with relative_step finds its own learning rates; --learning_rate, --unet_lr and "
            "--text_encoder_lr"
            " are not used (relative_step=False uses them)"
        )
    return lines


@dataclass(frozen=True)
class Warned:
    """A warning at start and the options that it is about."""

    options: tuple[str, ...]
    text: str


def warnings_of(
    options: OptimizerOptions, *, lr_scheduler: str = "constant", unet_lr: float | None = None,
    text_encoder_lr: Sequence[float] | None = None,
) -> list[Warned]:
    """Settings that the chosen optimizer makes doubtful; the run goes on."""
    choice, found = choose(options), []
    if choice.one_rate_for_all_groups:
        rates = {"unet_lr": [unet_lr] if unet_lr is not None else [], "text_encoder_lr": list(text_encoder_lr or ())}
        used = {name: values or [options.learning_rate] for name, values in rates.items()}
        if 0 < used["unet_lr"][0] <= TOO_LOW_FOR_ADAPTIVE:
            low = "unet_lr" if unet_lr is not None else "learning_rate"
            found.append(
                Warned((low,), f"--{low} is {used['unet_lr'][0]}; {choice.name} scales it itself and wants about 1.0")
            )
        if len({value for values in used.values() for value in values if value}) > 1:  # a part of rate 0 is not trained
            names = tuple(n for n, values in rates.items() if any(v != options.learning_rate for v in values))
            flags = " and ".join(f"--{name}" for name in names)
            found.append(Warned(names, f"{flags}: {choice.name} uses one rate for all groups, that of the first group"))
    if choice.moves_own_rates and (largest := choice.kwargs.get("max_lr", 1e-3)) < options.learning_rate:
        text = f"--learning_rate is {options.learning_rate}, above max_lr {largest}; {choice.name} starts at 1e-6"
        found.append(Warned(("learning_rate",), text))
    if choice.is_adafactor and not choice.finds_own_rate:
        if options.max_grad_norm != 0:
            found.append(
                Warned(("max_grad_norm",), "--max_grad_norm is not 0; AdaFactor clips updates itself, 0 is recommended")
            )
        if lr_scheduler != "constant_with_warmup":
            text = f"--lr_scheduler is {lr_scheduler}; AdaFactor with a fixed rate wants constant_with_warmup"
            found.append(Warned(("lr_scheduler",), text))
        if choice.kwargs.get("clip_threshold", 1.0) != 1.0:
            text = "clip_threshold in --optimizer_args is not 1.0, which is recommended for AdaFactor"
            found.append(Warned(("clip_threshold",), text))
    return found

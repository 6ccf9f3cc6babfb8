"""Modules around a model: what compilers, trainers and adapters wrap it in, in memory and in the names of saved weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch.nn as nn

from lldfast.errors import InputError

# Classes that run the module in this attribute and change nothing about its values. They are told by their names, since
# importing torch.compile's machinery takes seconds, and the other packages may be absent.
TRANSPARENT = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "module",
    "lightning_fabric.wrappers._FabricModule": "module",
}
# Classes that keep only a part of each parameter between their own steps.
SHARDED = (
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.distributed.fsdp.FSDPModule",
    "fairscale.nn.data_parallel.fully_sharded_data_parallel.FullyShardedDataParallel",
)
# Parts of a parameter's name that wrappers put in, anywhere.
COMPONENTS = (
    "_orig_mod",  # torch.compile
    "module",  # DataParallel, DistributedDataParallel, DeepSpeed
    "_fsdp_wrapped_module",
    "_fpw_module",  # fairscale's FSDP
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_forward_module",  # Lightning Fabric
)
# What stands before every name where a trainer's module held the model: PEFT's two attributes, or Lightning's.
LEADING = ("base_model.model.", "model.")


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside wrappers that do not change its values; its parameters are the same objects.

    A PEFT model gives the model that its adapters were put into: they act there, and both compute the same. A learnt prompt acts
    around the model, so then the PEFT model itself is the model.

    Raises:
        InputError: parameters are sharded or have no values here, or an adapter changes more than the model's layers.
    """
    while True:
        names = _class_names(module)
        attribute = next((TRANSPARENT[name] for name in names if name in TRANSPARENT), None)
        if attribute is not None:
            module = getattr(module, attribute)
        elif "peft.peft_model.PeftModel" in names or "peft.mixed_model.PeftMixedModel" in names:
            if learnt_prompt(module):
                _check_whole(module)
                return module
            module = _below_adapters(module)
        else:
            _check_whole(module)
            return module


def has_wrappers(names: Iterable[str]) -> bool:
    """Whether a wrapper's part is in one of the parameters' names."""
    return any(part in COMPONENTS for name in names for part in name.split("."))


def plain_name(name: str, own: Collection[str] = ()) -> str:
    """A parameter's name without the parts that wrappers put in; parts in `own` are the model's."""
    return ".".join(part for part in name.split(".") if part not in COMPONENTS or part in own)


def plain_names(names: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """{name in a checkpoint: name without wrappers}, for a model whose parameters are called `own`.

    Raises:
        InputError: two names become one.
    """
    parts = {part for name in own for part in name.split(".")}
    found = {name: plain_name(name, parts) for name in names}
    first: dict[str, str] = {}
    for name, plain in found.items():
        if first.setdefault(plain, name) != name:
            raise InputError(f"the weights {first[plain]} and {name} are both {plain} once the wrappers' parts are taken out")
    return found


def without_leading(names: Mapping[str, str], own: Collection[str]) -> dict[str, str] | None:
    """`names` without the trainer's prefix that all of them have; None where taking one away makes none the model's."""
    for prefix in LEADING:
        if all(plain.startswith(prefix) for plain in names.values()):
            shorter = {name: plain.removeprefix(prefix) for name, plain in names.items()}
            if any(plain in own for plain in shorter.values()):
                return shorter
    return None


def _class_names(module: nn.Module) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def learnt_prompt(module: nn.Module) -> int:
    """Places that a learnt prompt takes before every text (prompt, prefix and P-tuning); 0 of a module that has none."""
    config = getattr(module, "active_peft_config", None) if hasattr(module, "peft_config") else None
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0  # type: ignore[union-attr]


def _below_adapters(module: nn.Module) -> nn.Module:
    """The model that the adapters of a PEFT model were put into."""
    from peft.tuners.tuners_utils import BaseTuner

    tuner: nn.Module = module.base_model  # type: ignore[assignment]
    for name, config in module.peft_config.items():  # type: ignore[operator, union-attr]
        kind = getattr(config.peft_type, "value", config.peft_type)
        # AdaLoRA's own forward only adds a term to the loss; those of other kinds choose or weigh adapters by the input.
        own_forward = type(tuner).forward is not BaseTuner.forward and kind != "ADALORA"
        if not isinstance(tuner, BaseTuner) or own_forward:
            raise InputError(f"PEFT adapter {name!r} is of type {kind}, which changes more than layers: not supported")
        if getattr(config, "alora_invocation_tokens", None):
            raise InputError(f"PEFT adapter {name!r} acts from its invocation tokens on (alora_invocation_tokens): not supported")
    inner: nn.Module = tuner.model  # type: ignore[assignment]
    return inner


def _check_whole(module: nn.Module) -> None:
    kind = type(module).__name__
    sharded = next((part for part in module.modules() if any(name in SHARDED for name in _class_names(part))), None)
    if sharded is not None:
        raise InputError(
            f"{kind}: a {type(sharded).__name__} holds a part of its parameters only; gather them into a plain model (a full "
            "state dict, or save_pretrained) and load that"
        )
    for name, p in module.named_parameters():
        if p.device.type == "meta":
            raise InputError(f"{kind}: parameter {name} has no values here (device meta): load the model without offloading")
        if type(p).__name__ == "DTensor" or (hasattr(p, "ds_id") and p.numel() == 0):
            raise InputError(f"{kind}: parameter {name} is sharded; gather the parameters into a plain model and load that")

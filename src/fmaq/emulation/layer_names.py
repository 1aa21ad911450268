"""What the layers of a model are called: as its modules are, but for what others put around them and around the model.

What torch.compile and DistributedDataParallel make of a module has it inside, and its layers keep their names.

LoRA, say, puts a layer `fc` into a module that takes its place and keeps it as `fc.base_layer`, and the model into one
that keeps it as `base_model.model`. The layer itself stays `fc`, so that one policy fits the model with adapters,
without, and with adapters merged. What an adapter adds is inside the layer: `fc.lora_A.default`; and products of the
module around it (VeRA has some) are those of `fc.adapter`. What is trained in a layer's place (`modules_to_save`) is
the layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

OWN = "adapter"
"""The part of the name that tells a module around a layer from the layer."""

AROUND_MODEL = {
    "torch._dynamo.eval_frame.OptimizedModule": ("_orig_mod",),
    "torch.nn.parallel.distributed.DistributedDataParallel": ("module",),
    "peft.peft_model.PeftModel": ("base_model",),
    "peft.tuners.tuners_utils.BaseTuner": ("model",),
}
AROUND_LAYER = {
    "peft.tuners.tuners_utils.BaseTunerLayer": ("base_layer",),
    "peft.utils.other.AuxiliaryTrainingWrapper": ("original_module", "modules_to_save"),
}
"""Classes of modules that stand around another, and what they call it."""


def layer_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module of a model: the layer's first, then the full ones, of a model around it, too."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        is_around = bool(_inside(module, AROUND_LAYER))
        own = [_name(model, path), _name(model, path, keep_prefix=True), *([] if is_around else [path])]
        known = names.setdefault(module, [])
        known += [name for name in dict.fromkeys(own) if name not in known]
    return names


def name_inside(name: str, module: nn.Module, path: str) -> str:
    """The name of the layer at a path inside of a module, whose own name is `name`."""
    if _inside(module, AROUND_LAYER):
        name = name.removesuffix(OWN).removesuffix(".")
    return ".".join(part for part in (name, _name(module, path)) if part)


def _name(model: nn.Module, path: str, keep_prefix: bool = False) -> str:
    """The layer's name at a path inside of a model; `keep_prefix`: with what the models around it call it."""
    parts: list[str] = []
    module, is_adapters = model, False
    for part in path.split(".") if path else ():
        in_layer, in_model = _inside(module, AROUND_LAYER), _inside(module, AROUND_MODEL)
        if not (is_adapters or part in in_layer or (part in in_model and not keep_prefix)):
            parts.append(part)
        is_adapters = part == "modules_to_save" and part in in_layer  # whose parts are called as adapters are
        module = module._modules[part] or module
    return ".".join([*parts, OWN] if _inside(module, AROUND_LAYER) else parts)


def _inside(module: nn.Module, around: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What a module calls the one that it stands around; nothing where it is none of these classes."""
    classes = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return tuple(name for cls in classes for name in around.get(cls, ()) if name in module._modules)

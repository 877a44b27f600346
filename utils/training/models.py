"""Classifiers from timm: creation, loading of weights, reinitialising the head, freezing."""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.checkpoints.checkpoint import StateDict
from utils.runtime.errors import UserError, first_line
from utils.training.model_sources import OWN_WEIGHTS, hub_client, is_source, read_source

MOST_LISTED = 6
NO_RATES: Mapping[str, float] = {}


def is_known(name: str) -> bool:
    """Whether this is the name of a timm model, of a hub repository, or of a folder."""
    return is_source(name) or timm.is_model(name)


def check_model_name(name: str, flag: str = "--model") -> None:
    """Raise UserError, with the closest names, if timm does not have this model."""
    if not timm.is_model(name):
        closest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(closest)}?" if closest else "timm.list_models() lists all names."
        if "/" in name:
            hint = f"for a model on the hub give hf-hub:{name}."
        raise UserError(f"{flag} {name}: timm has no such model; {hint}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag in the name
        raise UserError(f"{flag} {name}: {error}") from None


def create_classifier(
    name: str,
    num_classes: int,
    image_size: int,
    weights: str | None = None,
    flag: str = "--model",
    rates: Mapping[str, float] = NO_RATES,
) -> nn.Module:
    """A timm classifier with `num_classes` logits (0: features).

    weights: one of timm's pretrained tags (a1_in1k), for a `name` such as hf-hub:ORG/NAME "default"; None: random.
    image_size: pixels, passed to models that are built for one size, such as vision transformers.
    rates: timm's `drop_rate` and `drop_path_rate`, where they are not the model's own.
    Raises UserError, naming `flag`, for an unknown model or tag, a failed download, a size that the model refuses, and
    rates that it does not take.
    """
    create = _create_from_source if is_source(name) else _create_from_timm
    model = create(name, {"num_classes": num_classes, **rates}, image_size, weights, flag)
    output_width(model, image_size, flag)
    return model


def _create_from_timm(
    name: str, settings: dict[str, Any], image_size: int, weights: str | None, flag: str
) -> nn.Module:
    check_model_name(name, flag)
    if timm.models.get_pretrained_cfg(name).fixed_input_size:
        settings["img_size"] = image_size
    if weights is None:
        try:
            return timm.create_model(name, **settings)
        except TypeError as error:
            raise _refused_rate(name, error) or error from None
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"{flag} {name}: cannot be built for images of {image_size} pixels ({error}).") from None
    architecture = name.split(".")[0]
    tags = [tagged.split(".", 1)[1] for tagged in timm.list_models(f"{architecture}.*", pretrained=True)]
    if weights not in tags:
        raise UserError(f"--weights {weights}: timm's tags for {architecture} are {', '.join(tags) or '(none)'}.")
    try:
        with hub_client():
            return timm.create_model(f"{architecture}.{weights}", pretrained=True, **settings)
    except Exception as error:  # the hub's client raises many kinds
        raise _refused_rate(name, error) or UserError(
            f"--weights {weights}: could not be fetched or loaded ({first_line(error)})."
        ) from None


def _refused_rate(name: str, error: Exception) -> UserError | None:
    """The error for a rate that the model does not take; None for any other error."""
    for rate, flag in (("drop_path_rate", "--drop-path"), ("drop_rate", "--drop-rate")):
        if isinstance(error, TypeError) and f"'{rate}'" in str(error):
            return UserError(f"{flag}: {name} does not take it; leave the flag out, or choose another --model.")
    return None


def _create_from_source(
    name: str, settings: dict[str, Any], image_size: int, weights: str | None, flag: str
) -> nn.Module:
    if weights not in (None, OWN_WEIGHTS):
        raise UserError(f"--weights {weights}: {name} has only its own weights; give --weights {OWN_WEIGHTS}.")
    source = read_source(name, flag)
    known = timm.models.get_pretrained_cfg(source.architecture)
    if source.pretrained_cfg.get("fixed_input_size", known is not None and known.fixed_input_size):
        settings["img_size"] = image_size
    if source.model_args.get("in_chans", 3) != 3:
        settings["in_chans"] = 3  # all images have three channels here
    try:
        used = source.name if weights is None else name
        with hub_client(used):
            return timm.create_model(used, weights is not None, **settings)
    except Exception as error:  # a config may ask for anything, and the hub's client raises many kinds
        problem = "cannot be built" if weights is None else "its weights cannot be fetched or loaded"
        raise _refused_rate(name, error) or UserError(
            f"{flag} {name}: {problem} for images of {image_size} pixels ({first_line(error)})."
        ) from None


def output_width(model: nn.Module, image_size: int, flag: str = "--model") -> int:
    """The number of logits or features that the model, on the CPU, gives for images of `image_size` pixels.

    Leaves the model in training mode. Raises UserError, naming `flag`, if it is built for another size, or if the
    images are too small for it.
    """
    try:
        with torch.no_grad():
            return model.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{flag}: the model refuses images of {image_size} pixels ({error})") from None
    finally:
        model.train()


def head_names(model: nn.Module) -> list[str]:
    """The names of the classifier's last layers in `named_modules` (one, except for a few models with two heads)."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


def head_size(model: nn.Module, state_dict: StateDict) -> int | None:
    """The number of classes of a state dict's head, or None if there is no head under the model's names."""
    weights = (state_dict.get(f"{head}.weight") for head in head_names(model))
    return next((weight.shape[0] for weight in weights if weight is not None and weight.ndim > 0), None)


def lacks_head(model: nn.Module, state_dict: StateDict) -> bool:
    """Whether a state dict has no weight under the model's names for its heads."""
    return not any(f"{head}.weight" in state_dict for head in head_names(model))


def is_head_key(key: str, heads: list[str]) -> bool:
    return any(key.startswith(f"{head}.") for head in heads)


def load_classifier(model: nn.Module, state_dict: StateDict, source: str, *, reinitialise_head: bool = False) -> None:
    """Load weights into the model, in place; with `reinitialise_head` the head keeps its initial values instead.

    state_dict: with timm's keys. Raises UserError as `load_strictly` does.
    """
    if reinitialise_head:
        heads = head_names(model)
        initial = {key: value for key, value in model.state_dict().items() if is_head_key(key, heads)}
        state_dict = {key: value for key, value in state_dict.items() if not is_head_key(key, heads)} | initial
    used = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    load_strictly(model, state_dict, source, f" Give the --model (now {used}) and --train-crop-size of these weights.")


def load_strictly(module: nn.Module, state_dict: StateDict, source: str, advice: str = "") -> None:
    """Load all of a module's state, in place; integer buffers that averaging turned into floats are cast back.

    Raises UserError, listing the keys, for anything missing, unexpected, of another shape or of an unfit dtype.
    """
    expected = module.state_dict()
    problems = [f"missing {key}" for key in expected.keys() - state_dict.keys()]
    problems += [f"unexpected {key}" for key in state_dict.keys() - expected.keys()]
    for key in expected.keys() & state_dict.keys():
        value, target = state_dict[key], expected[key]
        if value.shape != target.shape:
            problems.append(f"{key} is {tuple(value.shape)}, expected {tuple(target.shape)}")
        elif not (value.is_floating_point() or value.dtype == target.dtype):
            problems.append(f"{key} is of {value.dtype}, expected {target.dtype}")
    if problems:
        listed = "; ".join(sorted(problems)[:MOST_LISTED])
        if len(problems) > MOST_LISTED:
            listed += f"; and {len(problems) - MOST_LISTED} more"
        raise UserError(f"{source}: these weights do not fit the model: {listed}.{advice}")
    module.load_state_dict(state_dict)


def freeze_backbone(model: nn.Module) -> None:
    """Train only the head: all other parameters stop requiring gradients (see `set_training_mode` for buffers)."""
    heads = head_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head_key(name, heads))


def set_training_mode(model: nn.Module, backbone_frozen: bool = False) -> None:
    """`model.train()`; a frozen backbone keeps its BatchNorm statistics and has no dropout."""
    model.train(not backbone_frozen)
    if backbone_frozen:
        for name in head_names(model):
            model.get_submodule(name).train()


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """SyncBatchNorm in place of BatchNorm, by timm's conversion (torch's own drops the activation of fused layers).

    On the CPU, for which torch has no such kernel, the model is returned unchanged.
    """
    return convert_sync_batchnorm(model) if device.type == "cuda" else model


def check_batch_norm(model: nn.Module, batch_size: int, flag: str) -> None:
    """Raise UserError if BatchNorm would see one image at a time, which has no useful statistics."""
    if batch_size == 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(f"--batch-size 1: {flag} has BatchNorm layers, which need at least two images in each process.")

"""Models in a hub repository or a local folder, by timm's names for them: hf-hub:ORG/NAME and local-dir:FOLDER."""

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import timm
from huggingface_hub.utils import logging as hub_logging
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

from utils.runtime.command_line import absolute
from utils.runtime.errors import UserError, first_line

HUB = ("hf-hub:", "hf_hub:")
FOLDER = "local-dir:"
OWN_WEIGHTS = "default"  # value of --weights that selects the weights in the repository or folder


class Source(NamedTuple):
    """The content of a config.json: the timm architecture, its arguments, and its pretrained weights.

    name: for timm.create_model; the folder in the hub's cache if the repository is there, so that no network is needed.
    """

    name: str
    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def is_source(name: str) -> bool:
    return name.startswith((*HUB, FOLDER))


def model_name(text: str) -> str:
    """The type of --model. A folder becomes absolute, so that the run can be resumed from any folder."""
    return f"{FOLDER}{absolute(text.removeprefix(FOLDER))}" if text.startswith(FOLDER) else text


def read_source(name: str, flag: str = "--model") -> Source:
    """Read the config.json of a source from its folder, the hub's cache, or the hub.

    Raises UserError, naming `flag`, if it cannot be read or does not name an architecture of timm.
    """
    try:
        with quiet_hub():
            timm_name = _cached(name)
            location = timm_name.partition(":")[2]
            read = load_model_config_from_path if timm_name.startswith(FOLDER) else load_model_config_from_hf
            config, architecture, model_args = read(location)
        source = Source(timm_name, architecture, dict(model_args or {}), dict(config))
    except Exception as error:  # the hub's client raises many kinds, and a config may contain anything
        message = f"{flag} {name}: its config.json cannot be read ({first_line(error)}). {_advice(name)}"
        raise UserError(message) from None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(f"{flag} {name}: its config.json names {reprlib.repr(architecture)}, which timm does not have.")
    return source


def plain_name(name: str) -> str:
    """The timm architecture of a model, with which exported weights are built without the source.

    Raises UserError for a source with model arguments, which the exported folder would not keep.
    """
    if not is_source(name):
        return name
    source = read_source(name)
    if source.model_args.keys() - {"num_classes", "img_size"}:
        names = ", ".join(sorted(source.model_args))
        raise UserError(f"--model {name}: its config.json has model_args ({names}), which an export cannot keep.")
    return source.architecture


def _cached(name: str) -> str:
    """The source's folder in the hub's cache as a name, so that no network is needed; else the name itself."""
    if name.startswith(FOLDER):
        return name
    repository, _, revision = name.partition(":")[2].partition("@")
    config = huggingface_hub.try_to_load_from_cache(repository, "config.json", revision=revision or None)
    return f"{FOLDER}{Path(config).parent}" if isinstance(config, str) else name


def _advice(name: str) -> str:
    if name.startswith(FOLDER):
        return "Expected a folder with config.json and weights, as written by timm's save_for_hf or utils.export."
    return (
        "Each start needs it, also a resumed one and --test-only; after a download it stays in the hub's cache "
        f"(HF_HOME). Connect to the network, or give a copy of the repository with {FOLDER}FOLDER."
    )


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the hub client's warnings about each attempt, and allow unpickling of plain weights only."""
    verbosity, forced = hub_logging.get_verbosity(), os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    hub_logging.set_verbosity_error()
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # timm may ask torch.load for more
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if forced is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced

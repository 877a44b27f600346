"""Models named by a repository of the hub or by a folder, as timm names them: hf-hub:ORG/NAME and local-dir:FOLDER."""

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
from utils.runtime.errors import UserError

HUB = ("hf-hub:", "hf_hub:")
FOLDER = "local-dir:"
OWN_WEIGHTS = "default"  # of --weights: those of the repository or folder


class Source(NamedTuple):
    """What a config.json says: the timm architecture, how it is built, and its pretrained weights.

    name: for timm.create_model; of the hub's cache where it holds the repository, which needs no network.
    """

    name: str
    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def is_source(name: str) -> bool:
    return name.startswith((*HUB, FOLDER))


def model_name(text: str) -> str:
    """The type of --model: a folder is the same one from wherever the run is resumed."""
    return f"{FOLDER}{absolute(text.removeprefix(FOLDER))}" if text.startswith(FOLDER) else text


def read_source(name: str, flag: str = "--model") -> Source:
    """Read the config.json of a named source: from its folder, the hub's cache, or the hub.

    Raises UserError, naming `flag`, where it cannot be read or names no architecture of timm.
    """
    try:
        with quiet_hub():
            timm_name = _cached(name)
            where = timm_name.partition(":")[2]
            read = load_model_config_from_path if timm_name.startswith(FOLDER) else load_model_config_from_hf
            config, architecture, model_args = read(where)
        source = Source(timm_name, architecture, dict(model_args or {}), dict(config))
    except Exception as error:  # the hub's client raises many kinds, and a config may hold anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag} {name}: its config.json cannot be read ({reason}). {_advice(name)}") from None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(f"{flag} {name}: its config.json names {reprlib.repr(architecture)}, which timm does not have.")
    return source


def plain_name(name: str) -> str:
    """The name of timm's architecture, under which exported weights are built without the source.

    Raises UserError for a source whose models are built with arguments of its own.
    """
    if not is_source(name):
        return name
    source = read_source(name)
    if source.model_args.keys() - {"num_classes", "img_size"}:
        raise UserError(
            f"--model {name}: is built with arguments of its own ({', '.join(sorted(source.model_args))}), which an "
            "export cannot keep."
        )
    return source.architecture


def _cached(name: str) -> str:
    """The name, or that of its folder in the hub's cache, so that a run resumes and is tested without the network."""
    if name.startswith(FOLDER):
        return name
    repository, _, revision = name.partition(":")[2].partition("@")
    config = huggingface_hub.try_to_load_from_cache(repository, "config.json", revision=revision or None)
    return f"{FOLDER}{Path(config).parent}" if isinstance(config, str) else name


def _advice(name: str) -> str:
    if name.startswith(FOLDER):
        return "Expected a folder with config.json and weights, as timm's save_for_hf or utils.export write it."
    return (
        "Each start needs it, a resumed one and --test-only too; once fetched, it stays in the hub's cache (HF_HOME). "
        f"Connect to the network, or give a copy of the repository with {FOLDER}FOLDER."
    )


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the hub client's warnings of each try, and without unpickling anything but plain weights."""
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

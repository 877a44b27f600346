"""Models in a hub repository or a local folder, by timm's names for them: hf-hub:ORG/NAME and local-dir:FOLDER."""

import os
import reprlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import huggingface_hub
import timm
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

from utils.arguments import LOCAL_DIR
from utils.runtime.errors import UserError, first_line

HUB = ("hf-hub:", "hf_hub:")
PATIENCE = 3.0  # seconds to connect to an address of the hub
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
    return name.startswith((*HUB, LOCAL_DIR))


def read_source(name: str, flag: str = "--model") -> Source:
    """Read the config.json of a source from its folder, the hub's cache, or the hub.

    Raises UserError, naming `flag`, if it cannot be read or does not name an architecture of timm.
    """
    try:
        timm_name = _cached(name)
        location = timm_name.partition(":")[2]
        with hub_client(timm_name):
            read = load_model_config_from_path if timm_name.startswith(LOCAL_DIR) else load_model_config_from_hf
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
    if name.startswith(LOCAL_DIR):
        return name
    repository, _, revision = name.partition(":")[2].partition("@")
    config = huggingface_hub.try_to_load_from_cache(repository, "config.json", revision=revision or None)
    return f"{LOCAL_DIR}{Path(config).parent}" if isinstance(config, str) else name


def _advice(name: str) -> str:
    if name.startswith(LOCAL_DIR):
        return "Expected a folder with config.json and weights, as written by timm's save_for_hf or utils.export."
    return (
        "Each start needs it, also a resumed one and --test-only; after a download it stays in the hub's cache "
        f"(HF_HOME). Connect to the network, or give a copy of the repository with {LOCAL_DIR}FOLDER."
    )


@contextmanager
def hub_client(name: str = "") -> Iterator[None]:
    """Settings for timm's reading of a model `name` from the hub or a folder.

    Silences the warnings about each attempt, and allows unpickling of plain weights only. If the hub cannot be reached,
    its client looks only into its cache: otherwise it repeats a request for 23 s, and timm makes two for a tag. Raises
    ConnectionError for a file that is not in the cache then.
    """
    problem = None if name.startswith(LOCAL_DIR) else hub_problem()
    verbosity, forced = hub_logging.get_verbosity(), os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    offline = hub_constants.HF_HUB_OFFLINE
    hub_logging.set_verbosity_error()
    hub_constants.HF_HUB_OFFLINE = problem is not None
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # timm may ask torch.load for more
    try:
        yield
    except LocalEntryNotFoundError:
        if problem is None:
            raise
        raise ConnectionError(f"{problem}, and the file is not in the hub's cache") from None
    finally:
        hub_logging.set_verbosity(verbosity)
        hub_constants.HF_HUB_OFFLINE = offline
        if forced is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced


def hub_problem() -> str | None:
    """Why no connection to the hub can be made, from one attempt; None if it can.

    A slow answer, or an error as the answer, counts as a connection: the hub's client then repeats the request.
    """
    if hub_constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(hub_constants.ENDPOINT, method="HEAD"), timeout=PATIENCE).close()
    except (HTTPError, TimeoutError):  # an answer; connected, but no answer in time
        return None
    except URLError as error:
        is_connected = isinstance(error.reason, ssl.SSLError)  # the hub's client may know other certificates
        return None if is_connected else f"{hub_constants.ENDPOINT} cannot be reached ({first_line(error.reason)})"
    except (OSError, ValueError):  # anything else is for the hub's client to report
        return None
    return None

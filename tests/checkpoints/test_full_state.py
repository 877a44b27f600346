"""A full state with any plain entry changed is refused with one sentence, or resumes as if it had not been changed."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY
from tests.helpers.hostile_values import changed, put
from utils import arguments
from utils.checkpoints import checkpoint
from utils.runtime.errors import UserError
from utils.training.state import TrainingState

NESTED: list = []
NESTED.append(NESTED)
VALUES = (
    None,
    True,
    -1,
    2**62,
    0.5,
    float("nan"),
    float("inf"),
    1e308,
    "text",
    "",
    [],
    {},
    [NESTED],
    {"a": {}},
    {5: 1},
)
VALUES = (*VALUES, torch.zeros(2), torch.zeros(()), torch.full((3, 3), float("nan")), b"bytes", (1, 2))
KINDS = {
    "_normal": (normal, [*SMALL, "--opt", "adamw"]),
    "_policy_gradient": (policy_gradient, [*SMALL_POLICY, "--clip-grad-norm", "1"]),
}


@pytest.fixture(scope="module", params=KINDS)
def stopped(request, image_folder, tmp_path_factory):
    """Script, its module, what it trains, and its state in the middle of its first epoch."""
    folder = tmp_path_factory.mktemp("run")
    module, flags = KINDS[request.param]
    found = {}
    real_take = TrainingState.take

    def keep(training):
        found["training"] = training
        return real_take(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "take", keep)
        patch.setattr(checkpoint, "save_checkpoint", lambda _, state: found.setdefault("state", checkpoint.copy(state)))
        data = ["--data-path", str(image_folder), "--output-dir", str(folder)]
        module.main([*flags, "--epochs", "1", "--checkpoint-steps", "1", *data])
    assert (found["state"]["epoch"], found["state"]["step"]) == (0, 1)
    return request.param, module, found["training"], found["state"]


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Of every entry, however deep, but those of arguments, networks, options of optimisers and later parameters."""
    if place:
        yield place
    if place[:1] in (("args",), ("model",), ("policy_net",), ("objective",)):
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in inner:
        option = place[-2:-1] == ("param_groups",) and key != "params"
        if not option and (place[-1:] not in (("state",), ("params",)) or key == 1):
            yield from places(held, (*place, key))


def mutants(state: dict) -> Iterator[tuple[str, dict]]:
    """States with one entry changed, removed or added, and what was changed."""
    for place in places(state):
        name = ".".join(map(str, place))
        for value in VALUES:
            yield f"{name} = {value!r:.30}", changed(state, place, partial(put, value=value))
        yield f"{name} removed", changed(state, place, lambda held, key: held.pop(key))
        value = state
        for key in place:
            value = value[key]
        if isinstance(value, dict) and place != ("args",):
            yield f"{name} with one more", changed(state, (*place, "more"), partial(put, value=1))
    yield "one more", {**state, "more": {}}


def test_an_entry_of_another_value_never_ends_in_a_traceback(stopped, monkeypatch):
    script, module, training, state = stopped
    parser = module.build_parser()
    outcomes = {}
    for what, mutant in [("nothing", state), *mutants(state)]:
        monkeypatch.setattr(checkpoint, "read", lambda _, mutant=mutant: mutant)
        try:
            found = checkpoint.read_checkpoint("a.pth", script)
            arguments.for_resume(parser, {}, found["args"], "a.pth")
            training.put_back(found, "a.pth")
            outcomes[what] = ""
        except UserError as error:
            outcomes[what] = str(error)
    assert outcomes["nothing"] == ""
    assert [message for message in outcomes.values() if "\n" in message or len(message) > 700] == []
    taken = {what for what, message in outcomes.items() if not message} - {"nothing"}
    # Compared with the data or the arguments later, a right value too, or begun again by the optimiser.
    free = (
        *("args = {", "best_f1 = 0.5", "classes", "image_files", "seconds = ", "skipped_steps = 46", "rng.0.cpu = "),
        *("meters.count = 46", "train_images = 46", "scaler = {}", "optimizers.classifier.state = {}"),
        *("optimizers.classifier.state.1 removed", "optimizers.classifier.state.1.step = tensor(0.)"),
    )
    wrong = sorted(what for what in taken if not what.startswith(free))
    assert not wrong, wrong
    assert "image_files.train = None" not in taken
    assert "classes.0 = None" not in taken
    assert "seconds = nan" not in taken

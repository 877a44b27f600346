"""Full states with entries that no run saves are refused with one sentence, or resume as if unchanged."""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY
from tests.helpers.hostile_values import changed, entries, put
from tests.helpers.parsing import PARSERS, parse
from utils import arguments
from utils.checkpoints import checkpoint, verify
from utils.runtime.errors import UserError
from utils.training.state import TrainingState

NESTED: list = []
NESTED.append(NESTED)
TENSORS = (torch.zeros(2), torch.zeros(()), torch.full((3, 3), float("nan")))
VALUES = (None, True, -1, 2**62, 0.5, float("nan"), "text", [], {}, [NESTED], {5: 1}, *TENSORS, b"bytes", (1, 2))
KINDS = {
    "_normal": (normal, [*SMALL, "--opt", "adamw"]),
    "_policy_gradient": (policy_gradient, [*SMALL_POLICY, "--clip-grad-norm", "1"]),
}


@pytest.fixture(scope="module", params=KINDS)
def stopped(request, image_folder, tmp_path_factory):
    """Script, its module, its TrainingState, and its state in the middle of its first epoch."""
    folder = tmp_path_factory.mktemp("run")
    module, flags = KINDS[request.param]
    kept = {}
    real_take = TrainingState.take

    def keep(training):
        kept["training"] = training
        return real_take(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "take", keep)
        patch.setattr(checkpoint, "save_checkpoint", lambda _, state: kept.setdefault("state", state))
        data = ["--data-path", str(image_folder), "--output-dir", str(folder)]
        module.main([*flags, "--epochs", "1", "--checkpoint-steps", "1", *data])
    assert (kept["state"]["epoch"], kept["state"]["step"]) == (0, 1)
    return request.param, module, kept["training"], kept["state"]


def is_changed(place: tuple) -> bool:
    """Leaves out entries of arguments and networks, options of optimisers, and later items of lists."""
    if place[0] in ("args", "model", "policy_net", "objective"):
        return len(place) == 1
    if "param_groups" in place[:-2]:
        option = place[place.index("param_groups") + 2]
        if option != "params":
            return False
    numbers = {key for container, key in pairwise(place) if container in ("state", "params")}
    return numbers <= {1} and not any(isinstance(key, int) and key > 1 for key in place)


def mutants(state: dict) -> Iterator[tuple[str, dict]]:
    """States with one entry changed, removed or added, and their descriptions."""
    for place in filter(is_changed, entries(state)):
        name = ".".join(map(str, place))
        for value in VALUES:
            yield f"{name} = {value!r:.30}", changed(state, place, partial(put, value=value))
        yield f"{name} removed", changed(state, place, lambda container, key: container.pop(key))
        value = state
        for key in place:
            value = value[key]
        if isinstance(value, dict) and place != ("args",) and "param_groups" not in place:  # where others are ignored
            yield f"{name} with one more", changed(state, (*place, "more"), partial(put, value=1))
    yield "one more", {**state, "more": {}}


@pytest.mark.slow
def test_a_changed_entry_never_ends_in_a_traceback(stopped, monkeypatch):
    script, module, training, state = stopped
    parser = module.build_parser()
    outcomes = {}
    for description, mutant in [("nothing", state), *mutants(state)]:
        monkeypatch.setattr(checkpoint, "read", lambda _, mutant=mutant: mutant)
        try:
            accepted_state = checkpoint.read_checkpoint("a.pth", script)
            arguments.for_resume(parser, {}, accepted_state["args"], "a.pth")
            training.put_back(accepted_state, "a.pth")
            outcomes[description] = ""
        except UserError as error:
            outcomes[description] = str(error)
    assert outcomes["nothing"] == ""
    assert [message for message in outcomes.values() if "\n" in message or len(message) > 700] == []
    accepted = {description for description, message in outcomes.items() if not message} - {"nothing"}
    # Compared with the data or the arguments later, also a possible value, or reinitialised by the optimiser.
    free = (
        "args = {", "best_f1 = 0.5", "classes", "image_files", "seconds = ", "skipped_steps = 46", "rng.0.cpu = ",
        "meters.count = 46", "train_images = 46", "scaler = {}", "optimizers.classifier.state = {}",
        "optimizers.classifier.state.1 removed", "optimizers.classifier.state.1.step = tensor(0.)",
    )  # fmt: skip
    wrong = sorted(description for description in accepted if not description.startswith(free))
    assert not wrong, wrong
    assert accepted.isdisjoint({"image_files.train = None", "classes.0 = None", "seconds = nan"})
    for name in ("format_version", "script", "epoch", "step", "images", "seconds", "classes", "args", "rng", "model"):
        expected = f"a.pth: its '{name}' is not "
        assert outcomes[f"{name} = None"].startswith((expected, "a.pth: holds weights but")), outcomes[f"{name} = None"]


# Values that are not among these, or only in combination


RNG = torch.Generator().manual_seed(0).get_state()
FP16 = {"amp": True, "amp_dtype": "fp16"}
SCALER = torch.amp.GradScaler("cpu").state_dict()
COMBINED = [
    ("epoch", 10**9),
    ("best_f1", 2.0),
    ("classes", ["a", "b", "a"]),
    ("args", argparse.Namespace()),
    *[("rng", value) for value in ([{"cpu": RNG}, {}], [RNG], [{"cpu": torch.zeros(5056)}], [{"cpu": RNG[1:]}])],
    ("optimizers", {"classifier": {"state": {0: 5}, "param_groups": []}}),
    ("optimizers", {"classifier": {"state": {}, "param_groups": [{"params": "abc"}]}}),
    ("meters", {"names": ["a"], "count": 1, "totals": torch.zeros(1, 2).double()}),
    ("meters", {"names": [], "count": -1, "totals": torch.zeros(1, 0).double()}),
    ("scaler", SCALER),
]


@pytest.mark.parametrize(("name", "value"), COMBINED, ids=lambda value: str(value)[:30].replace("\n", ""))
def test_impossible_values_are_refused_by_name(stopped, name, value):
    state = stopped[3]
    message = f"^bad.pth: its '{name}' is not .*; this is not a complete checkpoint"
    with pytest.raises(UserError, match=message) as caught:
        verify.check_full_state("bad.pth", {**state, name: value})
    assert "\n" not in str(caught.value)


def test_a_scaler_is_required_with_fp16_only(stopped):
    state = {**stopped[3], "args": {**stopped[3]["args"], **FP16}}
    verify.check_full_state("a.pth", {**state, "scaler": SCALER})
    for scaler in ({}, {**SCALER, "scale": float("nan")}):
        with pytest.raises(UserError, match="its 'scaler' is not the state of a gradient scaler"):
            verify.check_full_state("a.pth", {**state, "scaler": scaler})


# Arguments


NOT_TYPED = [
    *[("lr", value) for value in ("0.1", -1.0, float("nan"), True, None, [0.1])],
    *[("epochs", value) for value in (2.0, 0, True)],
    *[("opt", value) for value in ("lamb", 1, ["sgd"])],
    *[("mean", value) for value in (0.3, [], [0.3, "x"], (0.3,))],
    *[("amp", 1), ("model", None), ("weights", True), ("seed", torch.zeros(3)), ("seed", {})],
]


@pytest.mark.parametrize(("name", "value"), NOT_TYPED, ids=lambda value: str(value)[:30])
def test_arguments_that_no_flag_accepts_are_refused(name, value):
    parser = PARSERS["_normal"]
    saved = vars(parse("_normal", "--finetune", "f", "--clip-grad-norm", 1, "--mean", 0.1, 0.2, 0.3, "--amp"))
    assert arguments.for_resume(parser, {}, saved, "f").mean == [0.1, 0.2, 0.3]
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=rf"^{flag}: run/f.pth says .*, which this flag does not accept") as caught:
        arguments.for_resume(parser, {}, {**saved, name: value}, "run/f.pth")
    assert "\n" not in str(caught.value)
    weights = arguments.for_weights(parser, {"finetune": "f"}, {**saved, name: value}, "f", test_only=False)
    assert getattr(weights, name) == parser.get_default(name) or name not in arguments.MODEL_FLAGS


def test_the_error_for_a_value_with_endless_text_is_short():
    doubled: list = []
    for _ in range(60):
        doubled = [doubled, doubled]
    with pytest.raises(UserError, match=r"^--seed: f says \[\[.*, which this flag does not accept") as caught:
        arguments.for_resume(PARSERS["_normal"], {}, {"seed": doubled}, "f")
    assert len(str(caught.value)) < 1000


def test_whole_numbers_are_accepted_for_any_number():
    saved = {"sigma": 6, "mean": [1], "grid": 32.0, "kernel": True}
    args = arguments.for_weights(PARSERS["_policy_gradient"], {"resume": "f"}, saved, "f", test_only=False)
    assert (args.sigma, args.mean, args.grid, args.kernel) == (6, [1], 64, 13)

"""--tracker: a tracker holds the log, the gallery and run.json of a run, each epoch once, and cannot harm the run."""

import json
import os
import signal
import sys
import threading
import time

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.parsing import PARSERS
from tests.helpers.runs import assert_same_run, run_script, status_of
from tests.helpers.tracked import as_rows, numbers, records, trackio_rows, wandb_rows
from utils import arguments
from utils.results.log import read_log, write_log
from utils.runtime.errors import UserError
from utils.runtime.signals import Interrupted
from utils.training import trackers
from utils.training.monitor import Monitor
from utils.training.trackers import (
    PROJECT,
    TRACKERS,
    TensorBoard,
    Tracker,
    Trackio,
    WeightsAndBiases,
    check_installed,
    within,
)

START = {
    "command": "_normal/train.py --lr 1", "time": "2025-01-01T00:00:00+00:00", "device": "CPU", "machine": "m",
    "processes": 1, "versions": {"torch": "2"}, "commit": None, "epoch": 0, "step": 0,
}  # fmt: skip
RUN = {"starts": [START], "data": {"train": {"root": "/data", "images": {"=a\udcff\n": 3}}}}
SENT = {"train": {"root": "/data", "images": {"=a\\udcff\n": 3}}}  # with an escape for the byte that is not text
LOG = [{"epoch": epoch, "train_loss": 2.0 - epoch, "val_auroc": None, "skipped_steps": epoch} for epoch in range(3)]


class Killed(Exception):
    """In the place of a SIGKILL."""


@pytest.fixture
def wandb(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))  # read on import
        yield pytest.importorskip("trackio")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "a run"
    (folder / "plots").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RUN))
    Image.new("L", (4, 4)).save(folder / "plots" / "masks_1.png")
    return folder


def given(*flags):
    return arguments.parse_given(PARSERS["_normal"], ["--data-path", "data", *flags])


def final(*flags, saved=None):
    if saved is None:
        return arguments.trackers(arguments.for_fresh_start(PARSERS["_normal"], given(*flags)))
    return arguments.trackers(arguments.for_resume(PARSERS["_normal"], given(*flags), saved, "runs/checkpoint.pth"))


def test_trackers_are_given_together_or_one_by_one():
    assert final() == []
    assert final("--tensorboard") == final("--tracker", "tensorboard") == ["tensorboard"]
    assert final("--tracker", "wandb", "trackio", "wandb") == final("--tracker", "wandb", "--tracker=trackio")
    assert final("--tracker", "trackio", "tensorboard") == final("--tracker", "trackio", "--tensorboard")
    assert final("--tracker", "trackio", "--tensorboard") == ["tensorboard", "trackio"]


def test_a_resumed_run_keeps_its_trackers_unless_others_are_given():
    saved = {"tracker": ["wandb"], "tensorboard": True}
    assert final(saved=saved) == ["tensorboard", "wandb"]
    assert final("--no-tensorboard", saved=saved) == ["wandb"]
    assert final("--tracker", "trackio", saved=saved) == ["trackio"]
    assert final("--tracker", "none", saved=saved) == []
    assert final(saved={"tensorboard": True}) == ["tensorboard"]  # of a version without --tracker


def test_contradicting_trackers_are_refused():
    with pytest.raises(UserError, match=r"^--tracker none wandb: give none alone, or leave it out"):
        given("--tracker", "none", "wandb")
    with pytest.raises(
        UserError, match=r"^--tracker tensorboard and --no-tensorboard: contradict each other; give one"
    ):
        given("--tracker", "tensorboard", "--no-tensorboard")
    with pytest.raises(UserError, match=r"--tracker: invalid choice: 'wandbb'.*did you mean wandb\?"):
        given("--tracker", "wandbb")


@pytest.mark.parametrize(
    ("name", "command"),
    [("wandb", 'pip install "wandb>=0.28";'), ("trackio", 'pip install trackio, followed by pip install "pillow>=13"')],
)
def test_a_missing_package_is_an_error_with_the_command_to_install(name, command, image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        run_script("_normal", image_folder, tmp_path / "run", "--epochs", "1", "--tracker", name)
    assert str(caught.value).startswith(f"--tracker {name}: the package {name} cannot be imported (")
    assert f"Install it with {command}" in str(caught.value)
    assert str(caught.value).endswith("or leave it out with --tracker none.")
    assert not (tmp_path / "run").exists()


def test_a_wandb_without_the_settings_that_keep_other_data_back_is_refused(wandb, monkeypatch):
    check_installed(["wandb"])
    monkeypatch.setitem(trackers.WANDB_SETTINGS, "disable_something_new", True)
    with pytest.raises(UserError, match=r"^--tracker wandb: the package wandb cannot be .* Install it with"):
        check_installed(["wandb"])


def follow(tracker, lines, folder, first_epoch):
    """One start of a run, up to the epochs of `lines`."""
    write_log(folder, LOG[:first_epoch])
    one = tracker(folder, first_epoch)
    one.open()
    write_log(folder, LOG[:lines])
    one.catch_up()
    one.close(failed=lines < len(LOG))
    return one


def test_tensorboard_holds_run_json(folder):
    follow(TensorBoard, 1, folder, 0)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    ((text,),) = [event.tensor_proto.string_val for event in events.Tensors("run.json/text_summary")]
    assert json.loads(text.decode().removeprefix("```\n").removesuffix("\n```")) == {"starts": [START], "data": SENT}


@pytest.mark.slow
def test_wandb_holds_the_log_the_gallery_and_run_json_and_nothing_else(wandb, folder):
    first = follow(WeightsAndBiases, 2, folder, 0)
    both = [START, START | {"epoch": 1}]
    (folder / "run.json").write_text(json.dumps(RUN | {"starts": both}))
    again = follow(WeightsAndBiases, 3, folder, 1)  # the second epoch is repeated
    assert again.id == first.id
    starts = records(folder)
    rows = wandb_rows(starts)
    assert [row["_step"] for row in rows] == [0, 1, 2]
    assert [numbers(row) for row in rows] == as_rows(LOG)
    pictures = list((folder / "wandb").rglob("*.png"))
    assert [row.get("masks.path") for row in rows] == [None, f"media/images/{pictures[0].name}", None]
    assert pictures[0].read_bytes() == (folder / "plots" / "masks_1.png").read_bytes()
    assert len(starts) == 2
    for start, count in zip(starts, (1, 2), strict=True):
        (run,) = [record.run for record in start if record.HasField("run")]
        assert (run.run_id, run.display_name, run.project, run.host) == (first.id, "a run", PROJECT, "")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config == {"starts": both[:count], "data": SENT, "_wandb": {}}
        kinds = {record.WhichOneof("record_type") for record in start}
        assert kinds <= {"header", "run", "history", "summary", "files", "telemetry", "exit"}
        assert [record.exit.exit_code for record in start if record.HasField("exit")] == [int(count == 1)]
    names = {path.name for path in (folder / "wandb").rglob("*") if path.is_file() and not path.is_symlink()}
    assert names == {f"run-{first.id}.wandb", pictures[0].name, "debug.log", "debug-internal.log"}


@pytest.mark.slow
def test_wandb_keeps_an_epoch_although_the_run_is_killed_soon_after(wandb, folder):
    if "x_transaction_log_flush_interval" not in wandb.Settings.model_fields:
        pytest.skip("this wandb has no such setting")
    check_installed(["wandb"])
    write_log(folder, LOG[:1])
    one = WeightsAndBiases(folder, 0)
    one.open()
    one.catch_up()
    try:
        end = time.monotonic() + 10
        while not wandb_rows(records(folder)) and time.monotonic() < end:
            time.sleep(0.1)
        assert [numbers(row) for row in wandb_rows(records(folder))] == as_rows(LOG[:1])  # before the run is closed
    finally:
        one.close(failed=False)


def test_trackio_holds_the_log_the_gallery_and_run_json(trackio, folder):
    first = follow(Trackio, 2, folder, 0)
    again = follow(Trackio, 3, folder.rename(folder.with_name("renamed")), 1)
    assert again.id == first.id
    assert first.id.startswith("a run-")
    rows = trackio_rows(trackio, PROJECT)[first.id]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [numbers(row) for row in rows] == as_rows(LOG)
    assert [("masks" in row) for row in rows] == [False, True, False]
    (run,) = [run for run in trackio.Api().runs(PROJECT) if run.name == first.id]
    assert {name: value for name, value in run.config.items() if not name.startswith("_")} == {
        "starts": [START],
        "data": SENT,
    }


def test_a_new_run_in_the_place_of_a_deleted_one_is_a_new_run_of_the_tracker(folder):
    state = {"wandb": {"id": "abc", "next_epoch": 2}}
    (folder / "trackers.json").write_text(json.dumps(state))
    resumed, fresh = WeightsAndBiases(folder, 1), WeightsAndBiases(folder, 0)
    assert (resumed.id, resumed.next_epoch) == ("abc", 2)
    assert (fresh.id != "abc", fresh.next_epoch) == (True, 0)
    (folder / "trackers.json").write_text('{"wandb": {"id": 3}}')
    assert WeightsAndBiases(folder, 1).next_epoch == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_stopped_and_killed_run_is_one_run_in_each_tracker(name, image_folder, tmp_path, monkeypatch, request):
    """Stopped within its second epoch, killed after it, and resumed when there was nothing left to train."""
    package = request.getfixturevalue(name)
    flags = ["--epochs", "2", "--tracker", name, "--resume", "auto"]
    show = Monitor.show

    def stop_afterwards(self, *arguments):
        show(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    def kill(self, *arguments):
        raise Killed

    for replacement, error in ((stop_afterwards, Interrupted), (kill, Killed)):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(Monitor, "show", replacement)
            run_script("_normal", image_folder, tmp_path, *flags)
        assert json.loads((tmp_path / "trackers.json").read_text())[name]["next_epoch"] == 1
    run_script("_normal", image_folder, tmp_path, *flags)
    log, state = read_log(tmp_path), json.loads((tmp_path / "trackers.json").read_text())[name]
    assert [line["epoch"] for line in log] == [0, 1]
    assert state["next_epoch"] == 2
    if name == "trackio":
        rows = trackio_rows(package, PROJECT)[state["id"]]
    else:
        starts = records(tmp_path)
        ids = [record.run.run_id for start in starts for record in start if record.HasField("run")]
        assert ids == [state["id"]] * 3
        rows = wandb_rows(starts)
    assert [numbers(row) for row in rows] == as_rows(log)


class Failing(Tracker):
    """Fails in the method that FAILING names."""

    name = package = install = "json"
    method = ""

    def first_to_send(self, first_epoch):
        return 0

    def open(self):
        self.fail("open")

    def send(self, epoch, values, masks):
        self.fail("send")

    def close(self, failed):
        self.fail("close")

    def fail(self, method):
        if self.method == method:
            raise RuntimeError(f"{method} is impossible\nfor a reason")


@pytest.mark.slow
def test_a_tracker_that_fails_is_one_warning_and_changes_no_bit_of_the_run(image_folder, tmp_path, monkeypatch, capsys):
    run_script("_normal", image_folder, tmp_path / "whole", "--epochs", "1")
    monkeypatch.setitem(TRACKERS, "trackio", Failing)
    monkeypatch.setattr(Failing, "method", "send")
    capsys.readouterr()
    run_script("_normal", image_folder, tmp_path / "part", "--epochs", "1", "--tracker", "trackio")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: json failed (send is impossible); the training is not affected."]
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    assert status_of(tmp_path / "part")["status"] == "finished"


@pytest.mark.parametrize("method", ["open", "send", "close"])
def test_a_tracker_is_given_up_after_its_first_error(method, folder, monkeypatch, capsys):
    monkeypatch.setitem(TRACKERS, "trackio", Failing)
    monkeypatch.setattr(Failing, "method", method)
    write_log(folder, LOG)
    monitor = Monitor(folder, ["a"], first_epoch=3, epochs=3, plot_every=None, trackers=["trackio"])
    monitor.begin(fresh=False)
    monitor.close(failed=False)
    assert capsys.readouterr().out == f"warning: json failed ({method} is impossible); the training is not affected.\n"
    assert monitor.trackers == []


def test_a_tracker_that_does_not_answer_is_given_up_in_time():
    end = threading.Event()
    try:
        with pytest.raises(TimeoutError, match=r"no answer within 0\.1 seconds"):
            within(0.1, end.wait)
    finally:
        end.set()
    assert within(10, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 / 0)

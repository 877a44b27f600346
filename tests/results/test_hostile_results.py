"""Every reader of results answers edited, cut and special files with a sentence."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from experiments.plan import read_record
from tests.helpers.finished_runs import undrawn, write_run  # noqa: F401
from tests.helpers.hostile_values import changed, put
from utils import report
from utils.data import folders
from utils.inference import classifier as inference
from utils.inference import model_card
from utils.results import provenance, run_folder
from utils.results.curves import learning_curves
from utils.results.figures import as_svg
from utils.results.log import read_log
from utils.runtime.errors import UserError
from utils.runtime.reading import open_regular, parse_json, read_bytes, read_json

DEEP = 20_000
CONTENTS = {
    "nothing": b"",
    "a brace": b"{",
    "null": b"null\n",
    "a number": b"5\n",
    "a list": b'[{"epoch": 0}]\n',
    "a list of lists": b"[[]]\n",
    "status": b'{"status": 5}\n',
    "deep objects": b'{"epoch":' * DEEP + b"\n",
    "deep enough to be read": b"[" * 500 + b"]" * 500 + b"\n",
    "5000 digits": b'{"epoch": 0, "val_f1": ' + b"9" * 5000 + b"}\n",
    "invalid UTF-8": b'{"epoch": 0, "\xff": 1}\n',
    "zeros": bytes(1000),
    "two epochs of one number": b'{"epoch": 0}\n{"epoch": 0}\n',
    "a negative epoch": b'{"epoch": -1}\n',
    "true for an epoch": b'{"epoch": true}\n',
    "half an epoch": b'{"epoch": 0.5}\n',
    "a huge epoch": b'{"epoch": 1000000000000}\n',
    "a long field": b"class,images,precision,recall,f1\n" + b"a" * 200_000 + b",1,1,1,1\n",
    "an open quote": b'class,images,precision,recall,f1\n"a,1,1,1,1\n',
}
FILES = ("log.jsonl", "run.json", "status.json", "metrics.json", "per_class.csv", "predictions.csv")
HARMLESS = {  # a log's last line may be cut short
    ("log.jsonl", "nothing"), ("log.jsonl", "a brace"), ("log.jsonl", "zeros"), ("status.json", "a huge epoch"),
}  # fmt: skip
VALUES = (None, True, -1, 2**62, 0.5, float("nan"), float("inf"), "", [], {}, [[[]]], {"a": {}}, "\x1b[2J")


pytestmark = pytest.mark.usefixtures("ended_in_time", "undrawn")


def make(path: Path, kind: str) -> None:
    """Replace a file by something that is not a regular file. kind: "pipe", "folder", or the target of a link."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "itself" else kind)


def messages(folder: Path) -> list[str]:
    """The notes on a run's folder, and the errors of the readers that need one of its files."""
    messages = run_folder.read_run_folder(folder).notes
    report.page([run_folder.read_run_folder(folder)])
    model_card.read_measured(folder / "log.jsonl")
    provenance.read_starts(folder)
    for read in (read_log, run_folder.read_evaluation, partial(run_folder.read_tested, name="clean")):
        try:
            read(folder)
        except UserError as error:
            messages.append(str(error))
    assert not [message for message in messages if "\n" in message or len(message) > 500]
    return messages


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_content_is_named_in_a_sentence(tmp_path, name):
    folder = write_run(tmp_path / "run")
    assert messages(folder) == []
    for what, content in CONTENTS.items():
        (folder / name).write_bytes(content)
        named = any(str(folder / name) in message for message in messages(folder))
        assert named or (name, what) in HARMLESS, (name, what)


@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "nowhere", "itself"])
@pytest.mark.parametrize("name", FILES)
def test_a_special_file_is_named_in_a_sentence(tmp_path, name, kind):
    folder = write_run(tmp_path / "run")
    make(folder / name, kind)
    named = any(str(folder / name) in message for message in messages(folder))
    assert named or (kind == "nowhere" and not name.endswith(".csv"))


def entries(value: object, place: tuple = ()):
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in inner:
        yield from entries(held, (*place, key))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log.jsonl", "run.json", "status.json", "metrics.json"])
def test_an_entry_of_any_value_never_breaks_the_page(tmp_path, name):
    folder = write_run(tmp_path / "run")
    is_log, text = name == "log.jsonl", (folder / name).read_text()
    content = [json.loads(line) for line in text.splitlines()] if is_log else json.loads(text)
    mutants = [changed(content, place, partial(put, value=value)) for place in entries(content) for value in VALUES]
    mutants += [changed(content, place, lambda held, key: held.pop(key)) for place in entries(content)]
    noted = 0
    for mutant in mutants:
        lines = mutant if is_log else [mutant]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = run_folder.read_run_folder(folder)
        report.page([run])
        noted += len(run.notes)
    assert noted > len(mutants) / 5


def test_curves_of_extreme_values_are_drawn(tmp_path):
    lines = [
        {"epoch": epoch, "val_f1": value, "lr_classifier": value, "train_loss": value}
        for epoch, value in enumerate((1e308, -1e308, float("inf"), float("nan"), None, 0.5, 1e-320, 2**64))
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert b"</svg>" in as_svg(learning_curves({"run": read_log(tmp_path)}))


def test_the_best_epoch_has_a_finite_f1(tmp_path):
    folder = write_run(tmp_path / "run")
    for value in (None, float("inf")):
        lines = [{"epoch": 0, "val_f1": 0.25}, {"epoch": 1, "val_f1": value}, {"epoch": 2}]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = report.page([run_folder.read_run_folder(folder)]).decode()
        assert "Highest macro F1 on val: 0.250, after epoch 0." in " ".join(page.split())


@pytest.mark.parametrize(
    ("row", "rank"),
    [(row, "1") for row in ("a,1,x,1,1", "a,1e5,1,1,1", "a,-1,1,1,1", "a", "a,1,1,1,1\na,1,1,1,1")]
    + [("a,1,1,1,1", rank) for rank in ("0", "2", "1.5", "9" * 400, "")],
)
def test_tables_with_impossible_values_are_refused(tmp_path, row, rank):
    (tmp_path / "per_class.csv").write_text(f"class,images,precision,recall,f1\n{row}\n")
    (tmp_path / "predictions.csv").write_text(f"image,target,prediction,true_rank,loss\na/0.png,a,a,{rank},0.5\n")
    with pytest.raises(UserError, match=r"(per_class|predictions)\.csv: "):
        run_folder.read_evaluation(tmp_path)


def test_result_names_cannot_point_to_another_folder(tmp_path):
    folder = write_run(tmp_path / "run")
    content = json.loads((folder / "metrics.json").read_text())
    for name in ("../../etc", "a/b", "", "\0"):
        (folder / "metrics.json").write_text(json.dumps({**content, "metrics": {name: {}}}))
        run = run_folder.read_run_folder(folder)
        assert (run.tested, len(run.notes)) == ({}, 1)


@pytest.mark.parametrize("name", ["finished.json", "progress.json"])
def test_damaged_files_of_a_plan_are_named_in_a_sentence(tmp_path, name):
    damaged = (b'{"seconds": "1"}', b'{"seconds": -1}', b'{"seconds": 1, "done": "x"}', b'{"stages": 1}')
    for content in (*CONTENTS.values(), *damaged):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: damaged"):
            read_record(tmp_path / name, None)
    for kind in ("pipe", "/dev/zero"):
        make(tmp_path / name, kind)
        with pytest.raises(UserError, match=name):
            read_record(tmp_path / name, None)


# Files given by flags


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "itself"])
def test_lists_that_are_special_files_are_refused(tmp_path, kind):
    make(tmp_path / "list", kind)
    with pytest.raises(UserError, match=r"^--exclude .*list: cannot be read \("):
        folders.read_excluded(tmp_path / "list")
    with pytest.raises(UserError, match=r"^--classes .*list: cannot be read \("):
        inference.read_class_names(tmp_path / "list")


# Reading


def test_files_larger_than_expected_are_not_read(tmp_path):
    (tmp_path / "large").write_bytes(b"12345")
    assert read_bytes(tmp_path / "large", most=5) == read_bytes(tmp_path / "large", most=None) == b"12345"
    with pytest.raises(OSError, match="has more than the 4 bytes expected here"):
        read_bytes(tmp_path / "large", most=4)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="has more than"):
        read_json(tmp_path / "sparse")
    with pytest.raises(OSError, match="has more than the 4 bytes"):
        read_bytes("/proc/self/status", most=4)  # its size is reported as 0


def test_impossible_file_names_are_refused():
    for name, match in (("a\0b", "no file can have this name"), ("a" * 5000, "File name too long")):
        with pytest.raises(OSError, match=match):
            open_regular(name)


def test_json_within_the_limits_is_parsed_unchanged():
    content = {"a": [1, 2**64 - 1, -(2**63), 0.5, None, "ü", {"b": []}], "nan": float("inf")}
    assert parse_json(json.dumps(content)) == content
    for text in ("9" * 21, "-" + "9" * 21, "[" * 102 + "]" * 102, "[" * DEEP, ""):
        with pytest.raises(ValueError):
            parse_json(text)

"""Hostile names and numbers: links in place of temporary files, control characters, formulas, huge sizes."""

import csv
import io
import os
from pathlib import Path

import pytest
import torch

from _normal import train as normal
from _policy_gradient import gallery
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, write_image
from tests.helpers.finished_runs import write_run
from utils import arguments, export, plots, predict, report, weight_averaging
from utils.audit import __main__ as audit
from utils.checkpoints import checkpoint
from utils.data import placing
from utils.data.cache_build import CacheBuild
from utils.data.folders import ImageFiles
from utils.inference import classifier as inference
from utils.phantoms import __main__ as phantoms_command
from utils.results.metrics import table_as_csv
from utils.results.run_folder import read_table
from utils.runtime.errors import UserError
from utils.runtime.files import opened_atomically, prove_writable, temporary_path, write_atomically
from utils.runtime.processes import run_script
from utils.runtime.progress import Progress, say
from utils.runtime.text import print_line

ESCAPE = "\x1b]0;title\x07\x1b[2Jred\nerror: forged\r\x9b5n\u202e"


pytestmark = pytest.mark.usefixtures("ended_in_time")


# Temporary files


def write_lines(path: Path) -> None:
    with opened_atomically(path) as file:
        file.write("new")


WRITERS = {
    "bytes": (lambda path: write_atomically(path, b"new"), temporary_path),
    "lines": (write_lines, temporary_path),
    "image": (lambda path: placing.write(str(path), b"new", 0), temporary_path),
    "probe": (
        lambda path: prove_writable(path.parent, memoryview(b"new")),
        lambda path: temporary_path(path.parent / "probe"),
    ),
}


@pytest.mark.parametrize("make", [os.symlink, os.link, lambda _, path: os.mkfifo(path)], ids=["link", "file", "pipe"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_with_the_temporary_name_is_not_written_to(tmp_path, name, make):
    write, temporary = WRITERS[name]
    path, victim = tmp_path / "new.txt", tmp_path / "victim"
    victim.write_bytes(b"precious")
    make(victim, temporary(path))
    write(path)
    assert victim.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == (["victim"] if name == "probe" else ["new.txt", "victim"])
    assert name == "probe" or path.read_bytes() == b"new"


def test_a_folder_with_the_temporary_name_is_a_user_error(tmp_path):
    (temporary_path(tmp_path / "new.txt") / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match=r"new.txt: cannot be written"):
        write_atomically(tmp_path / "new.txt", b"new")


def test_the_previous_checkpoint_is_not_copied_through_a_link(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, {"epoch": 0})
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")

    def no_link(_, target):
        os.symlink(victim, target)  # made by another process just before the copy
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    checkpoint.save_checkpoint(tmp_path, {"epoch": 1})
    assert victim.read_bytes() == b"precious"
    assert checkpoint.read(tmp_path / checkpoint.PREVIOUS) == {"epoch": 0}


@pytest.mark.parametrize("name", ["lock", "pixels.u8", "sizes.part", "index.npy"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_cache_is_not_built_through_a_link(tmp_path, name, kind):
    write_image(tmp_path / "train" / "a" / "0.png", torch.zeros(4, 4).numpy())
    files = ImageFiles.find(tmp_path / "train")
    build = CacheBuild(tmp_path, files, lambda image: torch.zeros(1, 4, 4, dtype=torch.uint8), gray=True,
                       parameters={}, max_bad_images=None, workers=0)  # fmt: skip
    build.folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (build.folder / name).symlink_to(victim) if kind == "link" else os.mkfifo(build.folder / name)
    with pytest.raises(UserError, match=r"cannot be|damaged"):
        list(build.build())
        build.open("size")
    assert victim.read_bytes() == b"precious"


# Terminals


def harmless(text: str, lines: int) -> bool:
    return text.replace("\n", "").isprintable() and text.count("\n") == lines


def test_no_output_holds_control_characters(capfd, tmp_path):
    def fail() -> None:
        raise UserError(f"{ESCAPE}: is damaged.")

    say(f"the image {ESCAPE}")
    print_line(ESCAPE)
    Progress(ESCAPE, 1, 1, 1).show(0, {})
    predict.print_to_stderr(ESCAPE)
    with pytest.raises(SystemExit) as caught:
        run_script(fail)
    out, err = capfd.readouterr()
    assert caught.value.code == 2
    assert harmless(out, 3) and harmless(err, 2), (out, err)
    assert r"error: \x1b]0;title\x07\x1b[2Jred\nerror: forged\r\x9b5n\u202e: is damaged." in err


def test_a_key_of_a_weight_file_is_shown_in_a_printable_form(capfd, tmp_path):
    torch.save({"model": {ESCAPE: torch.tensor(float("nan"))}}, tmp_path / "w.pth")
    with pytest.raises(SystemExit):
        run_script(lambda: weight_averaging.main([str(tmp_path / "w.pth"), "-o", str(tmp_path / "x.pth")]))
    assert harmless(capfd.readouterr().err, 1)


# Tables


@pytest.mark.parametrize("start", ["=", "+", "@", "\t", "\r", "\uff1d", "'", "'="])
def test_formulas_in_tables_become_text_and_are_read_back(tmp_path, start):
    name = f"{start}cmd|' /C calc'!A0"
    (tmp_path / "table.csv").write_bytes(table_as_csv([{"image": name, "loss": -0.5, "class": "plain", "n": -1}]))
    text = io.StringIO((tmp_path / "table.csv").read_bytes().decode(), newline="")
    _, (cell, loss, plain, number) = csv.reader(text)
    assert cell == f"'{name}"
    assert (loss, plain, number) == ("-0.500000", "plain", "-1")
    assert read_table(tmp_path / "table.csv", ("image",))[0]["image"] == name


def test_tables_of_predictions_and_audits_hold_no_formula(tmp_path, monkeypatch):
    [line] = list(predict.as_csv(iter([("=1+1.png", ["@a", "b"], [0.75, 0.25])]), ["@a", "b"], 1, 0))[1:]
    assert line == "'=1+1.png,'@a,0.75,b,0.25\n"
    write_image(tmp_path / "data" / "train" / "=a" / "-1.png", torch.eye(8).numpy())
    audit.main([str(tmp_path / "data"), "-o", str(tmp_path / "out"), "-j", "0"])
    rows = list(csv.reader((tmp_path / "out" / "images.csv").open(newline="")))
    assert rows[1][:2] == ["train", "'=a"]


# Numbers and names on the command line


@pytest.mark.parametrize("flag", ["--train-crop-size", "--val-resize-size", "--batch-size", "--epochs", "--workers",
                                  "--ra-reps", "--grid", "--kernel", "--masks-per-image"])  # fmt: skip
def test_sizes_beyond_any_machine_are_refused(flag):
    with pytest.raises(UserError, match=f"^{flag} {10**18 + 1}: expected at most") as caught:
        policy_gradient.main([flag, str(10**18 + 1)])
    assert caught.value.agreed


def test_sizes_beyond_any_machine_in_a_file_are_refused():
    parser = normal.build_parser()
    with pytest.raises(UserError, match=r"^--workers 1000000: expected at most 1024"):
        arguments.for_resume(parser, {}, {**arguments.defaults(parser), "workers": 10**6}, "a/checkpoint.pth")


LONG, NUL, DIGITS = "n" * 5000, "a\0b", "9" * 5000
READERS = [  # commands, and the words before the name of a file that they read
    (normal.main, ["--data-path"]), (normal.main, ["--resume"]), (normal.main, ["--finetune"]),
    (normal.main, ["--exclude"]), (plots.main, ["curves"]), (plots.main, ["recall"]), (predict.main, []),
    (predict.main, ["weights.pth"]), (report.main, []), (export.main, []), (audit.main, []), (gallery.main, []),
    (weight_averaging.main, ["-o", "x.pth"]),
]  # fmt: skip
TYPED = [(main, [*words, name]) for main, words in READERS for name in (LONG, NUL, ESCAPE)] + [
    (normal.main, ["--output-dir", LONG]), (normal.main, ["--output-dir", NUL]), (normal.main, ["--model", LONG]),
    (normal.main, ["--resume", "auto", "--output-dir", LONG]), (normal.main, ["--seed", DIGITS]),
    (normal.main, ["--cache-dataset", "host", "--cache-dir", LONG]), (normal.main, ["--lr", DIGITS]),
    (normal.main, ["--opt", ESCAPE]), (policy_gradient.main, [f"--{ESCAPE}"]), (plots.main, [ESCAPE]),
    (report.main, [".", "-o", LONG]), (plots.main, ["curves", ".", "-o", f"{LONG}.png"]),
    (audit.main, [".", "-o", LONG]), (audit.main, [".", "-j", "1000000"]),
    (weight_averaging.main, ["a.pth", "-o", LONG]), (inference.read_class_names, Path(LONG)),
    (phantoms_command.main, [LONG]), (phantoms_command.main, [NUL]), (phantoms_command.main, ["p", "--scale", "1e300"]),
]  # fmt: skip


@pytest.mark.parametrize(("main", "typed"), TYPED, ids=[f"{main.__module__} {typed!a:.40}" for main, typed in TYPED])
def test_hostile_words_end_in_a_printable_sentence(capfd, tmp_path, monkeypatch, image_folder, main, typed):
    monkeypatch.chdir(tmp_path)
    if main is normal.main:
        data = [] if typed[0] == "--data-path" else ["--data-path", str(image_folder)]
        typed = [*SMALL, "--epochs", "1", *data, *typed]
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(typed))
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    assert len(err.splitlines()[-1]) < 2500
    assert (out + err).replace("\n", "").isprintable()
    assert not any(line.startswith("error: forged") for line in err.splitlines())
    assert "--cache-dir" in str(typed) or os.listdir(tmp_path) == []


def test_too_little_memory_is_a_user_error(capfd):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes")):

        def fail(error=error) -> None:
            raise error

        with pytest.raises(SystemExit):
            run_script(fail)
        assert capfd.readouterr().err.startswith("error: there is too little memory for this;")
    with pytest.raises(ValueError, match="another"):
        run_script(lambda: int("another"))


@pytest.mark.slow
def test_the_name_of_a_run_is_printed_without_control_characters(tmp_path, capfd):
    folder = write_run(tmp_path / "a\x1b[2J\nb")
    report.main([str(folder)])
    assert harmless(capfd.readouterr().out, 1)

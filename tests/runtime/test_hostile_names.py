"""Names and numbers made to harm: links in the way of temporary files, control characters, formulas, sizes."""

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
from utils.data.cache_build import CacheBuild
from utils.data.folders import ImageFiles
from utils.inference import classifier as inference
from utils.phantoms import __main__ as phantoms_command
from utils.radimagenet import images
from utils.results.metrics import table_as_csv
from utils.results.run_folder import read_table
from utils.runtime.errors import UserError
from utils.runtime.files import not_followed, opened_atomically, prove_writable, temporary_path, write_atomically
from utils.runtime.processes import run_script
from utils.runtime.progress import Progress, say
from utils.runtime.text import FORMULA, as_cell, from_cell, print_line

ESCAPE = "\x1b]0;title\x07\x1b[2Jred\nerror: forged\r\x9b5n\u202e"


pytestmark = pytest.mark.usefixtures("ended_in_time")


# Temporary files


def write_lines(path: Path) -> None:
    with opened_atomically(path) as file:
        file.write("new")


WRITERS = {
    "bytes": (lambda path: write_atomically(path, b"new"), temporary_path),
    "lines": (write_lines, temporary_path),
    "image": (lambda path: images.write(str(path), b"new", 0), temporary_path),
    "probe": (
        lambda path: prove_writable(path.parent, memoryview(b"new")),
        lambda path: temporary_path(path.parent / "probe"),
    ),
}


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "file"])
@pytest.mark.parametrize("name", WRITERS)
def test_what_has_a_temporary_files_name_is_not_written_to(tmp_path, name, kind):
    write, temporary = WRITERS[name]
    path, victim = tmp_path / "new.txt", tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(temporary(path))
    elif kind == "file":
        os.link(victim, temporary(path))
    else:
        temporary(path).symlink_to(victim if kind == "link" else tmp_path / "absent")
    write(path)
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "absent").exists()
    assert sorted(os.listdir(tmp_path)) == (["victim"] if name == "probe" else ["new.txt", "victim"])
    assert name == "probe" or path.read_bytes() == b"new"


def test_a_folder_in_a_temporary_files_place_is_a_sentence(tmp_path):
    (temporary_path(tmp_path / "new.txt") / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match=r"new.txt: cannot be written"):
        write_atomically(tmp_path / "new.txt", b"new")


def test_the_previous_checkpoint_is_not_copied_through_a_link(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, {"epoch": 0})
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")

    def no_link(_, target):
        os.symlink(victim, target)  # by somebody else, at the worst moment
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


def test_no_link_is_followed_and_no_pipe_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("pipe", "link"):
        for mode in ("w", "ab"):
            with pytest.raises(OSError), open(tmp_path / name, mode, opener=not_followed):
                pass
    assert not (tmp_path / "file").exists()
    for _ in range(2):
        with open(tmp_path / "file", "ab", opener=not_followed) as file:
            file.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"xx"


# Terminals


def harmless(text: str, lines: int) -> bool:
    return text.replace("\n", "").isprintable() and text.count("\n") == lines


def test_no_exit_prints_control_characters(capfd, tmp_path):
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


@pytest.mark.parametrize(
    ("main", "arguments_"),
    [
        (report.main, [ESCAPE]),
        (report.main, ["--" + ESCAPE]),
        (plots.main, [ESCAPE]),
        (plots.main, ["curves", ESCAPE]),
        (weight_averaging.main, [ESCAPE, "-o", "x.pth"]),
        (export.main, [ESCAPE]),
        (predict.main, ["weights.pth", ESCAPE]),
        (audit.main, [ESCAPE]),
        (audit.main, [".", "--workers", ESCAPE]),
        (gallery.main, [ESCAPE]),
        (normal.main, ["--data-path", ESCAPE]),
        (normal.main, ["--opt", ESCAPE]),
        (normal.main, ["--resume", ESCAPE]),
        (policy_gradient.main, ["--" + ESCAPE]),
    ],
)
def test_what_was_typed_is_repeated_in_a_printable_form(capfd, main, arguments_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(arguments_))
    out, err = capfd.readouterr()
    assert caught.value.code == 2
    assert "forged" in err
    assert not any(line.startswith("error: forged") for line in err.splitlines())
    assert (out + err).replace("\n", "").isprintable()


def test_a_key_of_a_weight_file_is_shown_in_a_printable_form(capfd, tmp_path):
    torch.save({"model": {ESCAPE: torch.tensor(float("nan"))}}, tmp_path / "w.pth")
    with pytest.raises(SystemExit):
        run_script(lambda: weight_averaging.main([str(tmp_path / "w.pth"), "-o", str(tmp_path / "x.pth")]))
    assert harmless(capfd.readouterr().err, 1)


# Tables


@pytest.mark.parametrize("start", [*FORMULA, "''", "'="])
def test_a_formula_in_a_table_is_text_and_comes_back(tmp_path, start):
    name = f"{start}cmd|' /C calc'!A0"
    (tmp_path / "table.csv").write_bytes(table_as_csv([{"image": name, "loss": -0.5, "class": "plain", "n": -1}]))
    text = io.StringIO((tmp_path / "table.csv").read_bytes().decode(), newline="")
    _, (cell, loss, plain, number) = csv.reader(text)
    assert cell == f"'{name}"
    assert (loss, plain, number) == ("-0.500000", "plain", "-1")
    assert read_table(tmp_path / "table.csv", ("image",))[0]["image"] == name


def test_cells_come_back_whatever_they_hold():
    for text in ("", "a", "'", "''", "'=", "=", "a'", "-", "@x", "\ttab", "\rreturn", "\nline"):
        assert from_cell(as_cell(text)) == text
        assert not as_cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert [as_cell(value) for value in (-1, -0.5, None)] == [-1, -0.5, None]


def test_the_tables_of_predictions_and_of_an_audit_hold_no_formula(tmp_path, monkeypatch):
    [line] = list(predict.as_csv(iter([("=1+1.png", ["@a", "b"], [0.75, 0.25])]), ["@a", "b"], 1, 0))[1:]
    assert line == "'=1+1.png,'@a,0.75,b,0.25\n"
    write_image(tmp_path / "data" / "train" / "=a" / "-1.png", torch.eye(8).numpy())
    audit.main([str(tmp_path / "data"), "-o", str(tmp_path / "out"), "-j", "0"])
    rows = list(csv.reader((tmp_path / "out" / "images.csv").open(newline="")))
    assert rows[1][:2] == ["train", "'=a"]


# Numbers and names on the command line


SIZES = [
    ("--train-crop-size", 10**9),
    ("--val-resize-size", 10**9),
    ("--batch-size", 10**12),
    ("--epochs", 10**18),
    ("--workers", 10**6),
    ("--ra-reps", 10**9),
]


@pytest.mark.parametrize(("flag", "value"), SIZES)
def test_a_size_that_no_machine_has_is_refused(flag, value):
    for module in (normal, policy_gradient):
        with pytest.raises(UserError, match=f"^{flag} .*: expected at most") as caught:
            module.main([flag, str(value)])
        assert caught.value.agreed


@pytest.mark.parametrize(("flag", "value"), [("--grid", 10**6), ("--kernel", 10**9 + 1), ("--masks-per-image", 10**9)])
def test_a_mask_that_no_machine_has_is_refused(flag, value):
    with pytest.raises(UserError, match=f"^{flag} {value}: expected at most"):
        policy_gradient.main([flag, str(value)])


def test_such_a_size_in_a_file_is_refused_too():
    parser = normal.build_parser()
    with pytest.raises(UserError, match=r"^--workers 1000000: expected at most 1024"):
        arguments.for_resume(parser, {}, {**arguments.defaults(parser), "workers": 10**6}, "a/checkpoint.pth")


LONG = "n" * 5000


@pytest.mark.parametrize(
    ("main", "typed"),
    [
        (normal.main, ["--output-dir", LONG]),
        (normal.main, ["--output-dir", "a\0b"]),
        (normal.main, ["--data-path", LONG]),
        (normal.main, ["--data-path", "a\0b"]),
        (normal.main, ["--resume", LONG]),
        (normal.main, ["--resume", "a\0b"]),
        (normal.main, ["--resume", "auto", "--output-dir", LONG]),
        (normal.main, ["--finetune", "a\0b"]),
        (normal.main, ["--exclude", LONG]),
        (normal.main, ["--exclude", "a\0b"]),
        (normal.main, ["--cache-dataset", "host", "--cache-dir", LONG]),
        (normal.main, ["--model", LONG]),
        (normal.main, ["--seed", "9" * 5000]),
        (normal.main, ["--epochs", "9" * 5000]),
        (normal.main, ["--lr", "9" * 5000]),
        (normal.main, ["--print-freq", "-" + "9" * 5000]),
        (report.main, [LONG]),
        (report.main, ["a\0b"]),
        (report.main, [".", "-o", f"{LONG}.html"]),
        (plots.main, ["curves", LONG]),
        (plots.main, ["curves", "a\0b"]),
        (plots.main, ["recall", "a\0b"]),
        (plots.main, ["curves", ".", "-o", f"{LONG}.png"]),
        (weight_averaging.main, ["a\0b", "-o", "x.pth"]),
        (weight_averaging.main, ["a.pth", "-o", LONG]),
        (export.main, [LONG]),
        (export.main, ["a\0b"]),
        (predict.main, [LONG, "image"]),
        (predict.main, ["weights.pth", LONG]),
        (predict.main, ["weights.pth", "a\0b"]),
        (predict.main, ["weights.pth", "image", "-b", "9" * 5000]),
        (audit.main, [LONG]),
        (audit.main, ["a\0b"]),
        (audit.main, [".", "-o", LONG]),
        (audit.main, [".", "-j", str(10**6)]),
        (gallery.main, [LONG]),
        (gallery.main, ["a\0b"]),
        (inference.read_class_names, Path(LONG)),
        (inference.read_class_names, Path("a\0b")),
    ],
)
def test_a_long_name_or_number_is_a_sentence(capfd, tmp_path, monkeypatch, image_folder, main, typed):
    monkeypatch.chdir(tmp_path)
    if main is normal.main:
        data = [] if typed[0] == "--data-path" else ["--data-path", str(image_folder)]
        typed = [*SMALL, "--epochs", "1", *data, *typed]
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(typed))
    assert caught.value.code == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert len(err.splitlines()[-1]) < 2500
    assert "--cache-dir" in str(typed) or os.listdir(tmp_path) == []


def test_too_little_memory_is_a_sentence(capfd):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes")):

        def fail(error=error) -> None:
            raise error

        with pytest.raises(SystemExit):
            run_script(fail)
        assert capfd.readouterr().err.startswith("error: there is too little memory for this;")
    with pytest.raises(ValueError, match="another"):
        run_script(lambda: int("another"))


def test_phantoms_of_bad_names_are_a_sentence(tmp_path):
    path = str(tmp_path / "p")
    for typed in ([LONG], ["a\0b"], [path, "--size", str(10**9)], [path, "--scale", "1e300"]):
        with pytest.raises(UserError):
            phantoms_command.main(typed)


def test_a_report_of_a_run_with_a_hostile_name(tmp_path, capfd):
    folder = write_run(tmp_path / "a\x1b[2J\nb")
    report.main([str(folder)])
    assert harmless(capfd.readouterr().out, 1)

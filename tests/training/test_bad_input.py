"""Bad input: one clear sentence, an exit code other than 0, no rank left waiting, nothing written over."""

import errno
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY, write_image_folder
from tests.helpers.ranks import run_ranks, run_torchrun
from utils.checkpoints import checkpoint
from utils.runtime import processes
from utils.runtime.errors import UserError
from utils.runtime.processes import EXIT_CODE


def refuse(script, *flags, match):
    small = SMALL if script is normal else SMALL_POLICY
    with pytest.raises(UserError, match=match) as caught:
        script.main([*small, *map(str, flags)])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--model", "resnet540"), r"--model resnet540: timm has no such model; did you mean resnet50"),
        (("--num-classes", 4), r"--num-classes 4: .* has 3 classes"),
        (("--batch-size", 37), "36 images, fewer than one global batch of 37 x 1 processes = 37"),
        (("--batch-size", 1), "--batch-size 1: --model has BatchNorm layers"),
        (("--device", "cuda"), "finds no CUDA device here; give --device cpu"),
        (("--weights", "a_tag", "--finetune", "b.pth"), "--weights a_tag: the weights already come from b.pth"),
        (("--finetune", "absent.pth"), "absent.pth: no such file"),
    ],
)
def test_both_kinds_of_values(flags, match, image_folder, tmp_path):
    refuse(normal, "--data-path", image_folder, "--output-dir", tmp_path / "run", *flags, match=match)
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--grid", 33), "--grid 33: expected 1 to 32"),
        (("--kernel", 4), "--kernel 4: .* odd"),
        (("--kernel", 65), "--kernel 65: too large"),
        (("--sigma", 0), "--sigma: .*above 0"),
        (("--sigma", -1), "--sigma: .*above 0"),
        (("--policy-model", "resnet10q"), "--policy-model resnet10q: timm has no such model"),
        (("--policy-sign", "adversarial"), "--policy-sign adversarial: the published objective"),
        (("--objective", "reinforce", "--baseline", "loo"), "--masks-per-image 2 or more"),
        (("--batch-size", 1, "--masks-per-image", 2), "--batch-size 1: --policy-model has BatchNorm layers"),
        (("--finetune", "x.pth"), "unrecognized arguments: --finetune"),
    ],
)
def test_values_of_the_method(flags, match, image_folder, tmp_path):
    refuse(policy_gradient, "--data-path", image_folder, "--output-dir", tmp_path / "run", *flags, match=match)


def test_folders(tmp_path):
    run = ("--output-dir", tmp_path / "run", "--data-path")
    refuse(normal, *run, tmp_path / "absent", match=r"--data-path .*absent: no such folder; expected DATA")
    (tmp_path / "empty").mkdir()
    refuse(normal, *run, tmp_path / "empty", match=r"empty/val: no such folder")
    for split in ("train", "val"):
        (tmp_path / "empty" / split).mkdir()
    refuse(normal, *run, tmp_path / "empty", match=r"empty/val: holds no class folders")
    data = write_image_folder(tmp_path / "data", images=4)
    shutil.rmtree(data / "val" / "dark")
    refuse(normal, *run, data, match=r"data/train/dark: this class is in 'train' but not in 'val'")
    (data / "val" / "dark").mkdir()
    refuse(normal, *run, data, match=r"data/val/dark: holds no image")
    shutil.copytree(data / "val" / "bright", data / "val" / "dark", dirs_exist_ok=True)
    (data / "test" / "zebra").mkdir()
    refuse(normal, *run, data, match=r"test/zebra: this class is in 'test' but not in 'train'")


def test_a_list_that_fits_no_image_is_refused(image_folder, tmp_path):
    listed = tmp_path / "list.txt"
    run = ("--data-path", image_folder, "--output-dir", tmp_path / "run", "--exclude", listed)
    refuse(normal, *run, match=r"--exclude .*list.txt: cannot be read \(No such file or directory\)")
    listed.write_text("dark/0.png\ntrain/dark/99.png\n")
    refuse(normal, *run, match=r"--exclude .*list.txt: names no image of the data; expected lines such as train/")
    listed.write_text("".join(f"train/dark/{number}.png\n" for number in range(12)))
    refuse(normal, *run, match=r"train/dark: --exclude leaves this class no image; shorten the list")


def test_a_mistake_found_late_does_not_lock_the_folder(image_folder, tmp_path):
    run = ("--data-path", image_folder, "--output-dir", tmp_path / "run")
    refuse(normal, *run, "--batch-size", 37, match="fewer than one global batch")
    refuse(policy_gradient, *run, "--baseline", "ema", match="--baseline ema")
    assert not (tmp_path / "run").exists()
    normal.main([*SMALL, *map(str, run), "--epochs", "1"])


def test_a_model_that_has_diverged_is_not_saved(image_folder, tmp_path):
    """The last update of an epoch is not seen by any loss of that epoch, but by the validation."""
    run = (
        "--data-path",
        image_folder,
        "--output-dir",
        tmp_path,
        "--batch-size",
        36,
        "--lr",
        1e25,
        "--wd",
        0,
        "--epochs",
        2,
    )
    refuse(normal, *run, match="the loss on val after epoch 0 is not finite, so this epoch was not saved")
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "run.json", "status.json"}
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_log_that_is_damaged_is_named(image_folder, tmp_path):
    normal.main([*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--epochs", "1"])
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write("garbage\n")
    with pytest.raises(UserError, match=r"log.jsonl: holds a line that is not the JSON of an epoch"):
        normal.main(["--resume", str(tmp_path / "checkpoint.pth"), "--epochs", "2", "--device", "cpu"])
    with pytest.raises(UserError, match=r"--epochs 1: .*later.pth has already trained 2 epochs and 0 steps"):
        state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        checkpoint.save(tmp_path / "later.pth", {**state, "epoch": 2})
        normal.main(["--resume", str(tmp_path / "later.pth"), "--epochs", "1", "--device", "cpu"])
    checkpoint.save(tmp_path / "torso.pth", {"format_version": 1, "optimizers": {}})
    with pytest.raises(UserError, match=r"torso.pth: its 'script' is not a str"):
        normal.main(["--resume", str(tmp_path / "torso.pth"), "--device", "cpu"])


def test_an_output_folder_that_cannot_be_made(image_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refuse(normal, "--data-path", image_folder, "--output-dir", tmp_path / "file" / "run", match="cannot be created")


def test_weights_of_another_architecture_name_the_keys(image_folder, tmp_path):
    data = ("--data-path", image_folder)
    normal.main([*SMALL, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path / "run")])
    weights = tmp_path / "run" / "model_0.pth"
    refuse(normal, *data, "--finetune", weights, "--model", "test_vit", match="was made with --model test_resnet")
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(weights, weights_only=True)["model"], bare)
    other = [flag if flag != "test_resnet" else "test_vit" for flag in SMALL]
    with pytest.raises(UserError, match=r"these weights do not fit the model: .*missing .*--model"):
        normal.main([*other, "--data-path", str(image_folder), "--finetune", str(bare), "--output-dir", str(tmp_path)])


def test_code_in_a_file_is_refused_unread(image_folder, tmp_path):
    import os
    import pickle

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Payload()}))
    data = ("--data-path", image_folder)
    for flags in (("--finetune", tmp_path / "bad.pth"), ("--resume", tmp_path / "bad.pth")):
        refuse(normal, *data, *flags, match=r"bad.pth: (holds pickled objects|not a checkpoint)")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_all_processes_with_its_path(workers, tmp_path):
    data = write_image_folder(tmp_path / "data", images=8)
    victim = data / "train" / "dark" / "3.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    flags = [*SMALL, "--batch-size", 4, "--workers", workers, "--data-path", data, "--output-dir", tmp_path / "run"]
    run = run_torchrun if workers else run_ranks
    result = run("_normal/train.py", *flags, "--epochs", 2, processes=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count(f"error: {victim}: cannot be read as an image") == 1
    assert "Traceback" not in result.stderr.split("torch/distributed/elastic")[0]
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_a_text_called_png(tmp_path):
    data = write_image_folder(tmp_path / "data", images=8)
    (data / "val" / "dark" / "1.png").write_text("no image")
    refuse(normal, "--data-path", data, "--output-dir", tmp_path / "run", match=r"val/dark/1.png: cannot be read as an")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--modell", "x"), ("--device", "cuda"), ("--model", "resnet540"), ("--grid", "99")])
def test_two_processes_say_it_once(flags, image_folder, tmp_path):
    arguments = [*SMALL_POLICY, "--data-path", image_folder, "--output-dir", tmp_path, *flags]
    run = run_torchrun if "--grid" in flags else run_ranks
    result = run("_policy_gradient/train.py", *arguments, processes=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count("\nerror: ") + result.stderr.startswith("error: ") == 1
    assert flags[-1] in result.stderr


def test_images_of_other_kinds_are_read_as_rgb(tmp_path):
    """Palette, transparent, one-bit and CMYK images, and names with spaces and non-ASCII letters."""
    from utils.data.dataset import read_image

    grey = Image.new("L", (4, 4), 128)
    for mode in ("P", "LA", "RGBA", "1", "CMYK", "RGB"):
        path = tmp_path / f"bild {mode} größe.{'tif' if mode == 'CMYK' else 'png'}"
        grey.convert("RGB").convert(mode).save(path)
        image = read_image(path)
        assert (image.mode, image.size) == ("RGB", (4, 4))


@pytest.mark.parametrize("kind", ["16.png", "16.tif", "32.tif", "float.tif"])
def test_more_than_eight_bits_are_refused_rather_than_clipped(kind, tmp_path):
    from utils.data.dataset import read_image

    types = {"16.png": np.uint16, "16.tif": np.uint16, "32.tif": np.int32, "float.tif": np.float32}
    Image.fromarray(np.array([[0, 256, 40_000, 65_535]]).astype(types[kind])).save(tmp_path / kind)
    with pytest.raises(UserError, match=rf"{kind}: cannot be read as an image \((16|32) bits a channel; save it with"):
        read_image(tmp_path / kind)


def test_too_few_file_handles_are_one_sentence(monkeypatch, capsys):
    """Also where the loader's own end raises something else over it, as it does when some workers have started."""

    def fail():
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        finally:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Alarm clock.")

    monkeypatch.setattr(processes, "_leave_at_once", lambda: sys.exit(EXIT_CODE))
    with pytest.raises(SystemExit, match="2"):
        processes.run_script(fail)
    assert capsys.readouterr().err.startswith("error: too many open files for this process: raise the limit")

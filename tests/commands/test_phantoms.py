"""The phantom set: reproducible, complete or absent, learnable but not trivial."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestClassifier

from tests.conftest import ROOT
from utils.phantoms import dataset as phantoms
from utils.phantoms.__main__ import main
from utils.runtime.errors import UserError

NAMES = list(phantoms.CLASSES)
TINY = {"seed": 3, "size": 32, "scale": 0.02}


def draw(name, *key, size=64):
    return phantoms.render(name, np.random.default_rng(key), size)


def files_of(root):
    """The content of every file under root, by relative path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return phantoms.generate(tmp_path_factory.mktemp("phantoms") / "set", **TINY)


# Classes and images


def test_classes_are_known_and_their_counts_uneven_and_scaled():
    counts = phantoms.CLASSES.values()
    assert sorted(NAMES) == NAMES
    assert 4 <= max(counts) / min(counts) <= 6
    totals = {split: sum(classes.values()) for split, classes in phantoms.image_counts(1.0).items()}
    assert totals == {"train": 1500, "val": 300, "test": 300}
    assert phantoms.image_counts(2.0)["train"] == {name: 2 * count for name, count in phantoms.CLASSES.items()}
    assert set(phantoms.image_counts(0.001)["test"].values()) == {2}
    with pytest.raises(ValueError, match=r"unknown class 'ct-foot'.*ct-abdomen-cyst.*us-breast-normal"):
        draw("ct-foot", 0)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_follows_its_generator_and_keeps_its_anatomy_at_any_size(name):
    image, large = draw(name, 1, size=32), draw(name, 1, size=128).astype(float)
    assert (image.dtype, image.shape) == (np.uint8, (32, 32))
    assert np.array_equal(image, draw(name, 1, size=32))
    assert not np.array_equal(image, draw(name, 2, size=32))
    averaged = large.reshape(32, 4, 32, 4).mean(axis=(1, 3))  # (128, 128) -> (row, 4, column, 4) -> (32, 32)
    assert np.corrcoef(image.ravel(), averaged.ravel())[0, 1] > 0.85


@pytest.mark.slow
def test_organs_are_obvious_and_findings_are_not():
    def features(split, share):
        names = [name for name, count in phantoms.CLASSES.items() for _ in range(round(count * share))]
        images = np.stack([draw(name, split, number, size=32) for number, name in enumerate(names)])
        # (image, 32, 32) -> (image, row, 2, column, 2) -> 16 x 16 averages -> (image, 256)
        return images.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4)).reshape(-1, 256), np.array(names)

    (train, train_names), (test, test_names) = features(0, 0.4), features(1, 0.2)
    guesses = RandomForestClassifier(100, random_state=0).fit(train, train_names).predict(test)
    organs, guessed_organs = (np.array([name.rsplit("-", 1)[0] for name in names]) for names in (test_names, guesses))
    counts = {name: np.sum(test_names == name) for name in NAMES}
    commonest = sum(max(counts[name] for name in NAMES if name.startswith(organ)) for organ in set(organs))
    assert np.mean(organs == guessed_organs) > 0.98
    # Better than the most frequent finding of the right organ, but far from perfect.
    assert commonest / len(test_names) + 0.05 < np.mean(guesses == test_names) < 0.9


# The set on disk


def test_the_set_has_the_layout_the_counts_and_the_format(tree):
    images = files_of(tree)
    assert sorted(images) == sorted(
        f"{split}/{name}/{number:05d}.png"
        for split, classes in phantoms.image_counts(TINY["scale"]).items()
        for name, count in classes.items()
        for number in range(count)
    )
    assert len(set(images.values())) == len(images)  # no two images are equal
    for file in tree.rglob("*.png"):
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
    assert tree.stat().st_mode == (tree / "train").stat().st_mode  # not that of a private temporary folder


def test_another_process_makes_the_same_bytes(tree, tmp_path):
    code = f"from utils.phantoms.dataset import generate; generate({str(tmp_path / 'set')!r}, **{TINY})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)
    assert files_of(tmp_path / "set") == files_of(tree)


def test_images_depend_on_the_seed_and_not_on_the_scale(tree, tmp_path):
    images = files_of(tree)
    more = files_of(phantoms.generate(tmp_path / "more", **TINY | {"scale": 0.03}))
    assert images.items() < more.items()
    other = files_of(phantoms.generate(tmp_path / "other", **TINY | {"seed": 4}))
    assert images.keys() == other.keys()
    assert not set(images.values()) & set(other.values())


@pytest.mark.parametrize("cause", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, cause):
    save, saved = Image.Image.save, []

    def interrupted(image, *args, **kwargs):
        if len(saved) == 30:
            raise cause
        saved.append(save(image, *args, **kwargs))

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(cause):
        phantoms.generate(tmp_path / "set", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_processes_leaves_the_set_of_the_faster(tmp_path, monkeypatch, tree):
    write_images = phantoms.write_images

    def overtaken(draft, *args):
        monkeypatch.setattr(phantoms, "write_images", write_images)
        phantoms.generate(tmp_path / "set", **TINY)  # by the other process, from start to end
        write_images(draft, *args)

    monkeypatch.setattr(phantoms, "write_images", overtaken)
    with pytest.raises(FileExistsError, match="exists already"):
        phantoms.generate(tmp_path / "set", **TINY | {"seed": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert files_of(tmp_path / "set") == files_of(tree)


# The default set


def test_the_default_set_is_generated_once_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(phantoms, "CLASSES", {"ct-head-normal": 2})
    monkeypatch.setenv("HOME", str(tmp_path))
    for cache_home, cache in (("", tmp_path / ".cache"), (str(tmp_path / "xdg"), tmp_path / "xdg")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
        root = phantoms.ensure_default()
        assert root == cache / f"policy-gradient-noise-masks/phantoms-v{phantoms.VERSION}-seed-0"
        assert len(files_of(root)) == 3 * 2
    monkeypatch.setattr(phantoms, "write_images", lambda *_: pytest.fail("the set exists"))
    assert phantoms.ensure_default() == root


def test_the_default_set_of_a_faster_process_is_used_but_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def overtaken(root):
        root.mkdir(parents=True)
        raise FileExistsError

    with monkeypatch.context() as patches:
        patches.setattr(phantoms, "generate", overtaken)
        root = phantoms.ensure_default()
    root.rmdir()
    root.write_bytes(b"")
    with pytest.raises(FileExistsError, match="exists already"):
        phantoms.ensure_default()


# The command


def test_the_command_prints_counts_and_refuses_bad_values(tmp_path, capsys):
    main([str(tmp_path / "set"), "--size", "32", "--scale", "0.02"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'set' / 'train'}: 33 images (ct-abdomen-cyst 2, ")
    for output, flags, message in (
        ("set", [], "exists already"),
        ("new", ["--seed", "-1"], "seed must not be negative, not -1"),
        ("new", ["--size", "31"], "size must be 32 to 1024 pixels, not 31"),
        ("new", ["--size", "1025"], "size must be 32 to 1024 pixels, not 1025"),
        ("new", ["--scale", "nan"], "scale must be above 0 and at most 100, not nan"),
        ("set/train/ct-head-normal/00000.png/new", [], "00000.png"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(tmp_path / output), *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

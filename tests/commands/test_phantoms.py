"""The phantom set: reproducible, whole or absent, physically plausible, learnable but not trivial."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestClassifier

from utils.phantoms import __main__ as phantoms_command
from utils.phantoms import anatomy as phantom_images
from utils.phantoms import dataset as phantoms

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = [name for name, _ in phantoms.CLASSES]
SIZE = 32  # pixels, the smallest: enough for everything but the looks


def read_tree(root):
    """Relative path -> pixels, of every file under root."""
    return {file.relative_to(root): np.asarray(Image.open(file)) for file in root.rglob("*") if file.is_file()}


def same_pixels(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


def draw(name, *key, size=64):
    return phantoms.render(name, np.random.default_rng(key), size)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return phantoms.generate(tmp_path_factory.mktemp("phantoms") / "set", seed=3, size=SIZE, scale=0.02)


@pytest.fixture
def quick(monkeypatch):
    """Let generate draw a tiny set whatever its caller asks for."""
    whole = phantoms.image_counts
    monkeypatch.setattr(phantoms, "image_counts", lambda scale=1.0: whole(0.001))


# Classes and single images


def test_class_names_are_sorted_and_their_counts_uneven():
    counts = [count for _, count in phantoms.CLASSES]
    assert sorted(set(NAMES)) == NAMES
    assert len(set(counts)) == len(counts)
    assert 4 <= max(counts) / min(counts) <= 6
    totals = {split: sum(classes.values()) for split, classes in phantoms.image_counts().items()}
    assert totals == {"train": 1500, "val": 300, "test": 300}


def test_counts_follow_scale_down_to_two_images():
    assert phantoms.image_counts(2.0)["train"] == {name: 2 * count for name, count in phantoms.CLASSES}
    assert {count for classes in phantoms.image_counts(0.001).values() for count in classes.values()} == {2}


@pytest.mark.parametrize("name", NAMES)
def test_render_follows_the_generator(name):
    image = draw(name, 1)
    assert image.dtype == np.uint8
    assert image.shape == (64, 64)
    assert image.std() > 20
    assert np.array_equal(image, draw(name, 1))
    assert not np.array_equal(image, draw(name, 2))


@pytest.mark.parametrize("name", NAMES)
def test_anatomy_does_not_depend_on_size(name):
    small, large = draw(name, 4, size=32).astype(float), draw(name, 4, size=128).astype(float)
    averaged = large.reshape(32, 4, 32, 4).mean(axis=(1, 3))  # (128, 128) -> (row, 4, column, 4) -> (32, 32)
    assert np.corrcoef(small.ravel(), averaged.ravel())[0, 1] > 0.85


def test_unknown_class_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown class 'ct-foot'.*ct-abdomen-cyst.*us-breast-normal"):
        draw("ct-foot", 0)


@pytest.mark.parametrize("size", [0, 31, 1025])
def test_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=f"size must be 32 to 1024 pixels, not {size}"):
        draw(NAMES[0], 0, size=size)


# Physics


def test_ct_noise_has_its_sigma_and_is_correlated_between_neighbours():
    noise = phantom_images.ct_noise(np.random.default_rng(0), 256, 12.0)
    assert noise.mean() == pytest.approx(0, abs=0.5)
    assert noise.std() == pytest.approx(12, rel=1e-3)
    assert np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1] > 0.15
    assert np.mean(np.abs(noise) < 12) == pytest.approx(0.683, abs=0.01)  # Gaussian


def test_ct_noise_does_not_depend_on_the_signal():
    def scan(hounsfield):
        phantom = np.full((128, 128), hounsfield, np.float32)
        return phantom_images.ct_scan(phantom, np.random.default_rng(5), sigma=10, level=40, width=400)

    air, bone = scan(-1000.0), scan(800.0)
    assert bone - air == pytest.approx(np.full_like(air, 1800 / 400), abs=1e-3)
    assert bone.std() == pytest.approx(air.std(), rel=1e-3)
    assert scan(40.0).mean() == pytest.approx(0.5, abs=0.02)  # the window's level is mid-grey


def test_mr_noise_is_rayleigh_in_air_and_gaussian_in_tissue():
    sigma, rng = 0.05, np.random.default_rng(0)
    air = phantom_images.rician(np.zeros((256, 256), np.float32), sigma, rng)
    tissue = phantom_images.rician(np.ones((256, 256), np.float32), sigma, rng)
    assert air.mean() == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.01)
    assert air.std() == pytest.approx(sigma * math.sqrt(2 - math.pi / 2), rel=0.02)
    assert tissue.mean() == pytest.approx(1, rel=0.01)
    assert tissue.std() == pytest.approx(sigma, rel=0.02)


def test_speckle_grows_with_the_signal_until_the_logarithm():
    amplitude = np.ones((256, 256), np.float32)
    amplitude[:, 128:] = 10
    envelope = phantom_images.speckle(amplitude, np.random.default_rng(0))
    dark, bright = envelope[:, :128], envelope[:, 128:]
    for part, level in ((dark, 1), (bright, 10)):
        assert np.sqrt(np.mean(part**2)) == pytest.approx(level, rel=0.05)
        assert part.std() / part.mean() == pytest.approx(math.sqrt(4 / math.pi - 1), rel=0.05)  # Rayleigh: 0.52
    assert bright.std() / dark.std() == pytest.approx(10, rel=0.05)
    assert np.log10(bright).std() == pytest.approx(np.log10(dark).std(), rel=0.05)


def test_backgrounds_tell_the_modalities_apart():
    def corners(name):
        images = [draw(name, seed) for seed in range(8)]
        return np.concatenate([image[rows, :4].ravel() for image in images for rows in (slice(4), slice(-4, None))])

    assert corners("ct-head-normal").max() == 0  # air, far below the window
    assert corners("us-breast-normal").max() == 0  # outside the sector
    assert corners("mr-brain-normal").mean() > 2  # the magnitude of noise is not zero


def test_ct_findings_change_the_attenuation_by_the_right_sign(monkeypatch):
    # Without the scanner, two findings in the same patient differ by the lesion alone.
    monkeypatch.setattr(phantom_images, "ct_scan", lambda hounsfield, *args, **kwargs: hounsfield)

    def lesion(organ, finding, seed):
        painter = phantoms.PAINTERS[organ]
        return painter(finding, np.random.default_rng(seed), 64) - painter("normal", np.random.default_rng(seed), 64)

    depths = []
    for seed in range(8):
        blood, stroke = lesion("ct-head", "haemorrhage", seed), lesion("ct-head", "infarct", seed)
        assert 10 < blood.max() < 70  # Hounsfield units
        assert stroke.min() < -5
        assert stroke.sum() < 0 < blood.sum()
        cyst, metastasis = lesion("ct-abdomen", "cyst", seed), lesion("ct-abdomen", "metastasis", seed)
        assert cyst.sum() < 0 > metastasis.sum()
        depths.append([np.median(difference[difference < -10]) for difference in (cyst, metastasis)])
        for difference in (blood, stroke, cyst, metastasis):
            assert 0.002 < np.mean(np.abs(difference) > 2) < 0.2  # a part of the image, not all of it
    water, solid = np.mean(depths, axis=0)
    assert water < solid - 20


def test_tumours_are_bright_and_cysts_let_the_beam_through():
    def average(name, statistic):
        return np.mean([statistic(draw(name, seed)) for seed in range(40)])

    def highlights(image):
        centre = image[12:52, 16:48]
        return centre.mean() / np.median(centre)

    def behind(image):
        return image[48:60, 20:44].mean()

    assert average("mr-brain-tumour", highlights) > average("mr-brain-normal", highlights) + 0.01
    assert average("us-breast-cyst", behind) > average("us-breast-carcinoma", behind) + 5


# The set on disk


def test_tree_has_the_layout_the_counts_and_the_format(tree):
    counts = phantoms.image_counts(0.02)
    assert sorted(path.name for path in tree.iterdir()) == ["test", "train", "val"]
    for split, classes in counts.items():
        assert sorted(path.name for path in (tree / split).iterdir()) == NAMES
        for name, count in classes.items():
            files = sorted(path.name for path in (tree / split / name).iterdir())
            assert files == [f"{number:05d}.png" for number in range(count)]
    for file in tree.rglob("*.png"):
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (SIZE, SIZE))


def test_no_two_images_are_equal(tree):
    images = read_tree(tree).values()
    assert len({image.tobytes() for image in images}) == len(images)


def test_another_process_makes_the_same_bytes(tree, tmp_path):
    command = [sys.executable, "-m", "utils.phantoms", tmp_path / "set", "--seed=3", f"--size={SIZE}", "--scale=0.02"]
    environment = os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    again = tmp_path / "set"
    files = [path.relative_to(tree) for path in tree.rglob("*.png")]
    assert files
    assert all((tree / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_another_seed_makes_other_images(tree, tmp_path):
    here, there = read_tree(tree), read_tree(phantoms.generate(tmp_path / "set", seed=4, size=SIZE, scale=0.02))
    assert here.keys() == there.keys()
    assert not any(np.array_equal(here[path], there[path]) for path in here)


def test_images_do_not_depend_on_the_scale(tree, tmp_path):
    few, many = read_tree(tree), read_tree(phantoms.generate(tmp_path / "set", seed=3, size=SIZE, scale=0.06))
    assert few.keys() < many.keys()
    assert same_pixels(few, {path: many[path] for path in few})


@pytest.mark.parametrize("occupant", ["set", "empty folder", "file"])
def test_what_exists_is_refused_and_left_alone(tree, tmp_path, occupant):
    root = tree
    if occupant == "empty folder":
        root = tmp_path / "root"
        root.mkdir()
    elif occupant == "file":
        root = tmp_path / "root"
        root.write_bytes(b"mine")
    before = {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}
    with pytest.raises(FileExistsError, match=f"{root} exists already; give a path that does not exist yet"):
        phantoms.generate(root, seed=9, size=SIZE, scale=0.02)
    assert {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))} == before
    assert occupant != "file" or root.read_bytes() == b"mine"


@pytest.mark.parametrize("cause", [KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing(tmp_path, monkeypatch, cause):
    save, saved = Image.Image.save, []

    def failing_save(image, *args, **kwargs):
        if len(saved) == 30:
            raise cause
        saved.append(save(image, *args, **kwargs))

    monkeypatch.setattr(Image.Image, "save", failing_save)
    with pytest.raises(cause):
        phantoms.generate(tmp_path / "set", size=SIZE, scale=0.02)
    assert len(saved) == 30
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_set_and_the_next_one_makes_it(tmp_path, tree):
    command = [sys.executable, "-m", "utils.phantoms", tmp_path / "set", "--seed=3", f"--size={SIZE}", "--scale=100"]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        while not list(tmp_path.rglob("*.png")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert not (tmp_path / "set").exists()
    phantoms.generate(tmp_path / "set", seed=3, size=SIZE, scale=0.02)
    assert same_pixels(read_tree(tmp_path / "set"), read_tree(tree))


def test_the_slower_of_two_processes_leaves_the_set_of_the_faster(tmp_path, monkeypatch, tree):
    write_images = phantoms.write_images

    def overtaken(draft, *args):
        monkeypatch.setattr(phantoms, "write_images", write_images)
        phantoms.generate(tmp_path / "set", seed=3, size=SIZE, scale=0.02)  # the other process, from start to end
        write_images(draft, *args)

    monkeypatch.setattr(phantoms, "write_images", overtaken)
    with pytest.raises(FileExistsError, match="exists already"):
        phantoms.generate(tmp_path / "set", seed=4, size=SIZE, scale=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert same_pixels(read_tree(tmp_path / "set"), read_tree(tree))


def test_two_processes_at_once_end_with_one_whole_set(tmp_path, tree):
    command = [sys.executable, "-m", "utils.phantoms", tmp_path / "set", "--seed=3", f"--size={SIZE}", "--scale=0.02"]
    pair = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "ab"]
    errors = [process.communicate(timeout=60)[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2]
    assert sorted(b"exists already" in error for error in errors) == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert same_pixels(read_tree(tmp_path / "set"), read_tree(tree))


def test_the_set_is_as_readable_as_any_new_folder(tree, tmp_path):
    (tmp_path / "plain").mkdir()
    assert tree.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seed": -1}, "seed"), ({"size": 8}, "size"), ({"scale": 0}, "scale"), ({"scale": math.nan}, "scale")],
)
def test_bad_numbers_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=f"{message} must "):
        phantoms.generate(tmp_path / "set", **arguments)
    assert list(tmp_path.iterdir()) == []


# The default set


def test_default_root_is_in_the_cache_and_names_version_and_seed(monkeypatch, tmp_path):
    name = f"policy-gradient-noise-masks/phantoms-v{phantoms.VERSION}-seed-7"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert phantoms.default_root(7) == tmp_path / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert phantoms.default_root(7) == tmp_path / "home" / ".cache" / name


def test_ensure_default_generates_once(monkeypatch, tmp_path, quick):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = phantoms.ensure_default(1)
    assert root == phantoms.default_root(1)
    images = read_tree(root)
    assert len(images) == 3 * 2 * len(NAMES)
    assert {image.shape for image in images.values()} == {(96, 96)}
    monkeypatch.setattr(phantoms, "write_images", lambda *args: pytest.fail("the set was there"))
    assert phantoms.ensure_default(1) == root


def test_ensure_default_takes_the_set_of_a_faster_process(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def overtaken(root, seed):
        root.mkdir(parents=True)
        raise FileExistsError

    monkeypatch.setattr(phantoms, "generate", overtaken)
    assert phantoms.ensure_default().is_dir()


def test_ensure_default_does_not_take_a_file_for_a_set(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = phantoms.default_root()
    root.parent.mkdir(parents=True)
    root.write_bytes(b"")
    with pytest.raises(FileExistsError, match="exists already"):
        phantoms.ensure_default()


# The command line


def test_command_line_prints_the_counts_of_each_split(tmp_path, capsys):
    phantoms_command.main([str(tmp_path / "set"), "--size", str(SIZE), "--scale", "0.02"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" images")[0] for line in lines] == [
        f"{tmp_path / 'set' / split}: {sum(classes.values())}" for split, classes in phantoms.image_counts(0.02).items()
    ]
    assert "ct-head-normal 4," in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}"], "exists already"),
        (["{tmp}/set", "--seed", "-1"], "seed must not be negative, not -1"),
        (["{tmp}/set", "--size", "big"], "'big': expected a whole number"),
        (["{tmp}/set", "--size", "5"], "size must be 32 to 1024 pixels, not 5"),
        (["{tmp}/set", "--scale", "-2"], "scale must be above 0 and at most 100, not -2"),
        (["{tmp}/file/set"], "file"),
        (["{tmp}/set", "--colour"], "unrecognized arguments: --colour"),
        ([], "required: output"),
    ],
)
def test_bad_command_lines_end_with_one_line_and_code_2(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        phantoms_command.main([argument.format(tmp=tmp_path) for argument in arguments])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Learnability


def test_organs_are_obvious_and_findings_are_not():
    def features(split, share):
        names = [name for name, count in phantoms.CLASSES for _ in range(round(count * share))]
        images = np.stack([draw(name, split, number) for number, name in enumerate(names)])
        # (image, 64, 64) -> (image, row, 4, column, 4) -> 16 x 16 averages -> (image, 256)
        return images.reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4)).reshape(-1, 256), np.array(names)

    (train, train_names), (test, test_names) = features(0, 0.4), features(1, 0.1)
    guesses = RandomForestClassifier(100, random_state=0).fit(train, train_names).predict(test)
    organs, guessed_organs = ([name.rsplit("-", 1)[0] for name in names] for names in (test_names, guesses))
    organ_accuracy = np.mean(np.array(organs) == guessed_organs)
    largest = [max(np.sum(test_names == name) for name in NAMES if name.startswith(organ)) for organ in set(organs)]
    organ_guess = sum(largest) / len(test_names)  # the commonest finding of the right organ
    assert organ_accuracy > 0.98
    assert organ_guess + 0.05 < np.mean(guesses == test_names) < 0.9

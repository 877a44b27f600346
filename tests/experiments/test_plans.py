"""Plans of experiments: commands of a stage, equal budgets, and subsets of the data as links."""

import fcntl
import json
import math
import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from experiments import run
from experiments.plan import PROBE, Arm, Contrast, Plan, Stage, Subset, heated_arm, read_plan
from experiments.plans import classification
from experiments.subsets import choose, link_subset
from tests.conftest import ROOT, SMALL, SMALL_POLICY
from utils import probe, weight_averaging
from utils.arguments import parse_given
from utils.inference.flags import probe_parser
from utils.runtime.errors import UserError

PLANS = sorted(path for path in (ROOT / "experiments" / "plans").glob("*.py") if path.stem != "__init__")
SCRIPTS = {"_normal": normal, "_policy_gradient": policy_gradient, PROBE: probe}
PARSERS = {name: script.build_parser() for name, script in SCRIPTS.items() if name != PROBE} | {PROBE: probe_parser("")}


def images_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


# Plans


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_flag_of_a_plan_is_known_to_its_script(path):
    plan = read_plan(path)
    assert plan.name == path.stem
    for arm in plan.arms:
        for stage in arm.stages:
            words = [*shlex.split(stage.flags), *([stage.start, "--data-path", "x"] if stage.script == PROBE else [])]
            given = parse_given(PARSERS[stage.script], words)
            assert stage.script == PROBE or (given["epochs"] == stage.epochs and stage.average <= stage.epochs)
            before = {f"{earlier.name}/{'average' if earlier.average else 'model_best'}.pth" for earlier in arm.stages}
            assert stage.start is None or stage.start in before


@pytest.mark.parametrize(("name", "epochs"), [("classification", 40), ("small", 100), ("small_10", 100)])
def test_all_arms_take_equally_many_updates(name, epochs):
    for arm in read_plan(ROOT / "experiments" / "plans" / f"{name}.py").arms:
        given = [parse_given(PARSERS[stage.script], shlex.split(stage.flags)) for stage in arm.stages]
        assert sum(flags["epochs"] for flags in given) == epochs, arm.name
        assert {flags["batch_size"] for flags in given} == {32}, arm.name


def test_the_primary_comparison_runs_first_then_seed_by_seed():
    arms = (Arm("a", (), 2), Arm("b", (), 1), Arm("c", (), 2))
    order = [(arm.name, seed) for arm, seed in Plan("p", "?", arms, "a").runs()]
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1)]
    order = [(arm.name, seed) for arm, seed in Plan("p", "?", arms, "a", (Contrast("x", "c", "a"),)).runs()]
    assert order == [("a", 0), ("c", 0), ("a", 1), ("c", 1), ("b", 0)]


def test_the_control_has_the_effective_rate_of_published():
    """SGD with lr c and decay d / c takes the same steps as lr 1 on c times the loss with decay d."""
    flags = shlex.split(classification.SCALED_RATE)
    results = []
    for factor, rate, decay in ((1, float(flags[1]), float(flags[3])), (math.log(64 * 64), 0.1, 1e-4)):
        weights = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.SGD([weights], lr=rate, momentum=0.9, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            (factor * 0.01 * weights.square().sum()).backward()
            optimizer.step()
        results.append(weights)
    torch.testing.assert_close(*results, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no PLAN"),
        ("PLAN = Plan('p', '?', (ARM, ARM), 'a')", "two arms have the same name"),
        ("PLAN = Plan('p', '?', (Arm('a', (STAGE, STAGE), 1),), 'a')", "two stages of the arm 'a' have the same name"),
        ("PLAN = Plan('p', '?', (ARM,), 'b')", "compares 'b', which is not one of its arms"),
        (
            "PLAN = Plan('p', '?', (ARM,), 'a', (Contrast('x', 'c', 'a'),))",
            "compares 'c', which is not one of its arms",
        ),
        ("PLAN = Plan('p', '?', (ARM,), 'a', outcome='f2')", "outcome 'f2' is unknown. Give one of balanced_loss"),
    ],
)
def test_an_invalid_plan_is_refused(text, message, tmp_path):
    path = tmp_path / "plan.py"
    arms = "STAGE = Stage('s', '_normal', '')\nARM = Arm('a', (STAGE,), 1)\n"
    path.write_text(f"from experiments.plan import Arm, Contrast, Plan, Stage\n{arms}{text}\n")
    with pytest.raises(UserError, match=message):
        read_plan(path)
    with pytest.raises(UserError, match="no such file"):
        read_plan(tmp_path / "other.py")


def test_commands_of_a_stage_are_those_of_a_user(tmp_path):
    stage = Stage("second", "_normal", "--epochs 3 --lr 0.1", start="first/average.pth", average=2, test="all")
    train, average, test = run.commands(stage, 7, Path("out/arm/seed7"), Path("DATA"), ["--device", "cpu"])
    script = f"{ROOT}/_normal/train.py --data-path DATA --device cpu"
    folder = "out/arm/seed7/second"
    assert shlex.join(train[1:]) == (
        f"{script} --epochs 3 --lr 0.1 --finetune out/arm/seed7/first/average.pth --seed 7 --resume auto "
        f"--output-dir {folder}"
    )
    assert shlex.join(average[1:]) == (
        f"-m utils.weight_averaging {folder}/model_1.pth {folder}/model_2.pth -o {folder}/average.pth --overwrite"
    )
    assert shlex.join(test[1:]) == (
        f"{script} --test-only --split test --resume {folder}/model_best.pth --output-dir {folder}"
    )


@pytest.mark.slow
def test_the_commands_of_a_heated_arm_work(image_folder, tmp_path):
    """In this process, on tiny data. What remains is what the analysis reads."""
    flags, policy_flags = " ".join(SMALL[2:]), " ".join(SMALL_POLICY[2:])
    arm = heated_arm("heated", f"{policy_flags} --epochs 3", f"{flags} --epochs 1", 1, "all")
    folder = tmp_path / "heated" / "seed3"
    for stage in arm.stages:
        for _, *command in run.commands(stage, 3, folder, image_folder, ["--device", "cpu", "--workers", "0"]):
            if command[0] == "-m":
                weight_averaging.main(command[2:])
            else:
                SCRIPTS[stage.script].main(command[1:])
    run.tidy(folder, arm.stages)
    expected = {f"{stage.name}/{name}" for stage in arm.stages for name in ("log.jsonl", "run.json")}
    expected |= {f"fine-tuning/{name}" for name in ("metrics.json", "per_class.csv", "predictions.csv")}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == expected
    assert json.loads((folder / "fine-tuning" / "metrics.json").read_text())["split"] == "test"
    assert "--seed 3" in json.loads((folder / "pretraining" / "run.json").read_text())["starts"][0]["command"]


# Subsets


def test_more_shots_include_fewer_shots_and_draws_differ():
    names = [f"{number:02}.png" for number in range(40)]
    few, more = choose(names, 5, draw=0), choose(reversed(names), 10, draw=0)
    assert len(few) == 5 and len(more) == 10 and set(few) < set(more)
    assert choose(names, 10, draw=1) != more
    assert choose(names, 100, draw=0) == names


def test_subset_links_to_the_chosen_images(image_folder, tmp_path):
    """The links are relative, so that data and links can be moved together; `val` and `test` keep all images."""
    data = Path(shutil.copytree(image_folder, tmp_path / "old" / "data"))
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("train/dark/0.png\nval/bright/1.png\n")
    folder = tmp_path / "old" / "links" / "subset"
    link_subset(data, Subset("*r*", without="striped", shots=4), folder, exclude)
    moved = Path(shutil.move(tmp_path / "old", tmp_path / "new")) / "links" / "subset"
    dark = choose([f"dark/{number}.png" for number in range(1, 12)], 4, 0)
    assert [name for name in images_of(moved / "train") if name.startswith("dark")] == dark
    assert sorted(os.listdir(moved / "train")) == ["bright", "dark"]
    left_in_val = {f"{name}/{number}.png" for name in ("bright", "dark") for number in range(7)} - {"bright/1.png"}
    assert images_of(moved / "val") == sorted(left_in_val)
    image = moved / "test" / "dark" / "2.png"
    assert image.read_bytes() == (image_folder / "test" / "dark" / "2.png").read_bytes()
    assert not Path(os.readlink(image)).is_absolute()


def test_a_drawn_subset_is_tested_on_all_that_is_left(image_folder, tmp_path):
    """12 images a class in `train` and 3 in `test` are one pool; excluded images are in neither part, `val` stays."""
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("train/dark/0.png\ntest/bright/1.png\nval/dark/2.png\n")
    drawn = {}
    for seed in (0, 1):
        subset = Subset("*r*", without="striped", shots=4, draw="seed", test="rest").of_seed(seed)
        folder = tmp_path / subset.name
        link_subset(image_folder, subset, folder, exclude)
        parts = {
            split: {str(path.resolve().relative_to(image_folder)) for path in (folder / split).rglob("*.png")}
            for split in ("train", "val", "test")
        }
        counts = (("train", 12), ("test", 3))
        names = {
            f"{split}/{name}/{i}.png" for name in ("bright", "dark") for split, count in counts for i in range(count)
        }
        pool = names - {"train/dark/0.png", "test/bright/1.png"}
        assert parts["train"] | parts["test"] == pool and not parts["train"] & parts["test"]
        assert [len(os.listdir(folder / "train" / name)) for name in ("bright", "dark")] == [4, 4]
        assert len(parts["val"]) == 13 and all(name.startswith("val/") for name in parts["val"])
        drawn[seed] = parts["train"]
        fewer = replace(subset, shots=2)
        link_subset(image_folder, fewer, tmp_path / fewer.name, exclude)
        few = set(images_of(tmp_path / fewer.name / "train"))
        assert len(few) == 4 and few < set(images_of(folder / "train"))
    assert drawn[0] != drawn[1]
    assert any(name.startswith("test/") for name in drawn[0] | drawn[1])  # `test` takes part in the draw
    assert all("-" in name for name in images_of(folder / "test"))  # as train-1.png, so that names cannot collide


def test_a_subset_with_other_links_is_replaced(image_folder, tmp_path):
    """Other data, another list, or a copy without its data; a subset with the right links is kept."""
    data, exclude = Path(shutil.copytree(image_folder, tmp_path / "data")), tmp_path / "exclude.txt"
    exclude.write_text("train/dark/0.png\n")
    folder, subset = tmp_path / "links" / "subset", Subset("*r*", without="striped")
    image = "train/dark/0.png"
    for root in (image_folder, data):
        link_subset(root, subset, folder)
        assert (folder / image).resolve() == (root / image).resolve()
    link_subset(data, subset, folder, exclude)
    assert not (folder / image).exists()
    copy = Path(shutil.copytree(folder, tmp_path / "far" / "away" / "subset", symlinks=True))
    link_subset(data, subset, copy, exclude)
    assert (copy / "test" / "dark" / "2.png").resolve() == data / "test" / "dark" / "2.png"
    before = copy.stat().st_ino
    link_subset(data, subset, copy, exclude)
    assert copy.stat().st_ino == before


def test_two_processes_make_the_links_of_a_folder_one_after_the_other(image_folder, tmp_path):
    """A lock belongs to an open file, so a thread stands for the second process."""
    first = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    (tmp_path / "subset.tmp" / "train").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(link_subset, image_folder, Subset("*r*", without="striped"), tmp_path / "subset")
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        assert not any((tmp_path / "subset.tmp" / "train").iterdir())
        os.close(first)
        second.result()
    assert os.listdir(tmp_path) == ["subset"]


def test_a_subset_without_classes_is_refused_and_leaves_nothing(image_folder, tmp_path):
    with pytest.raises(UserError, match="has no class like us-\\*"):
        link_subset(image_folder, Subset("us-*"), tmp_path / "subset")
    assert not (tmp_path / "subset").exists()


def test_names_of_subsets_differ():
    subsets = [Subset(), Subset("a*"), Subset(without="a*"), Subset("a*", shots=5), Subset("a*", shots=5, draw=1)]
    subsets += [Subset("a*", shots=5, draw="seed"), Subset("a*", shots=5, test="rest")]
    assert len({subset.name for subset in subsets}) == len(subsets)

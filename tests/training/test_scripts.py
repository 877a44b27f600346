"""Both scripts in this process, on a tiny set: what their flags do to a run, and what a run leaves behind."""

import csv
import json
import math

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import write_image_folder
from utils.checkpoints import checkpoint
from utils.results.log import read_log
from utils.results.metrics import CALIBRATION_NAMES, METRIC_NAMES
from utils.runtime.errors import UserError


def evaluate_only(script, *flags, data):
    script.main(["--test-only", "--device", "cpu", "--workers", "0", "--data-path", str(data), *map(str, flags)])


def test_a_pretraining_leaves_the_files_it_promises(train):
    folder = train(policy_gradient, "--epochs", 2)
    expected = {"checkpoint.pth", "checkpoint_prev.pth", "log.jsonl", "run.json", "status.json"}
    expected |= {"model_0.pth", "model_1.pth"}
    assert {path.name for path in folder.iterdir()} == expected
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert (state["epoch"], state["step"], state["script"]) == (2, 0, "_policy_gradient")
    assert state["classes"] == ["bright", "dark", "striped"]
    assert state["args"]["lr"] == 0.1
    assert set(state["optimizers"]) == {"classifier", "policy"}
    assert not any(checkpoint.WRAPPERS.match(key) for key in state["model"])
    assert "prior" in state["policy_net"]
    lines = read_log(folder)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[0]["lr_policy"] == pytest.approx(0.01)
    assert lines[1]["lr_policy"] == pytest.approx(0.005)  # a cosine over both epochs
    assert "val_auroc" in lines[1]
    assert "val_auroc" not in lines[0]
    assert state["best_f1"] == max(line["val_f1"] for line in lines)


@pytest.mark.parametrize(("script", "flags"), [(normal, ()), (policy_gradient, ("--mask-policy", "none"))])
def test_the_best_model_is_that_of_the_epoch_with_the_highest_macro_f1(script, flags, train, capsys):
    folder = train(script, *flags, "--epochs", 2)
    lines = read_log(folder)
    best = torch.load(folder / "model_best.pth", weights_only=True)["model"]
    of_best_epoch = torch.load(folder / f"model_{int(lines[1]['val_f1'] > lines[0]['val_f1'])}.pth", weights_only=True)
    assert all(torch.equal(best[key], value) for key, value in of_best_epoch["model"].items())
    output = capsys.readouterr().out
    assert (
        f"Best macro F1 on val: {max(line['val_f1'] for line in lines):.4f}, in {folder / 'model_best.pth'}" in output
    )
    assert "(best)" in output


def test_a_pretraining_on_masked_images_chooses_no_best_model(train, capsys):
    """It would be chosen on clean images, which the classifier has not been trained on."""
    folder = train(policy_gradient, "--epochs", 1, "--mask-policy", "uniform")
    assert not (folder / "model_best.pth").exists()
    output = capsys.readouterr().out
    assert "(best)" not in output
    assert "Average the weights of the last epochs" in output


def test_the_published_loss_is_about_log_cells_times_the_cross_entropy(train):
    for mask_policy, exact in (("uniform", 1e-6), ("learned", 0.2)):
        line = read_log(train(policy_gradient, "--epochs", 1, "--mask-policy", mask_policy, name=mask_policy))[0]
        assert line["train_loss"] == pytest.approx(math.log(64) * line["train_cross_entropy"], rel=exact)


CONTROLS = [
    ("--mask-policy", "none"),
    ("--mask-policy", "uniform"),
    ("--mask-policy", "prior"),
    ("--mask-policy", "prior", "--objective", "reinforce"),
    ("--objective", "published-unscaled"),
    ("--objective", "published-unscaled", "--policy-sign", "adversarial"),
    ("--objective", "reinforce"),
    ("--objective", "reinforce", "--baseline", "none"),
    ("--objective", "reinforce", "--baseline", "loo", "--masks-per-image", 2),
    ("--objective", "reinforce", "--policy-sign", "adversarial"),
    ("--objective", "reinforce", "--entropy-weight", 0.5),
    ("--objective", "pathwise"),
    ("--objective", "pathwise", "--policy-sign", "adversarial"),
    ("--objective", "pathwise", "--keep-mean"),
    ("--masks-per-image", 3),
]


@pytest.mark.slow
def test_every_mask_policy_and_objective(train):
    """Each setting trains, and to other weights than every other setting: none of the flags is without effect."""
    policies, classifiers = {}, {}
    for number, flags in enumerate([(), *CONTROLS]):
        folder = train(policy_gradient, "--epochs", 1, "--lr", 0.05, *flags, name=str(number))
        state = torch.load(folder / "checkpoint.pth", weights_only=True)
        assert all(value.isfinite().all() for value in state["model"].values())
        learns = "none" not in flags[:2] and "uniform" not in flags
        assert ("policy" in state["optimizers"]) == learns
        classifiers[flags] = state["model"]["fc.weight"]
        if learns:
            head = "heads.log_alpha" if "prior" in flags else "heads.alpha_head.6.weight"
            policies[flags] = state["policy_net"][head]
    for found in (classifiers, policies):
        assert all(
            one == other or found[one].shape != found[other].shape or not torch.equal(found[one], found[other])
            for one in found
            for other in found
            if found is policies or {*one, *other}.isdisjoint({"adversarial", "--baseline", "--entropy-weight"})
        )


def test_flags_without_effect_are_named(train, capsys):
    train(policy_gradient, "--epochs", 1, "--mask-policy", "uniform", "--policy-lr", 0.1)
    assert "--mask-policy uniform: --policy-model --policy-lr without effect." in capsys.readouterr().out


def test_without_masks_the_joint_loop_is_the_plain_loop(train):
    unused = ("--grid", 99)  # larger than the image, but there is no mask
    joint = train(policy_gradient, "--epochs", 2, "--mask-policy", "none", *unused, name="joint")
    plain = train(normal, "--epochs", 2, name="plain")
    one, other = (torch.load(folder / "model_1.pth", weights_only=True)["model"] for folder in (joint, plain))
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.slow
def test_policy_flags_reach_the_policy(train):
    base = train(policy_gradient, "--epochs", 1, name="base")
    reference = torch.load(base / "checkpoint.pth", weights_only=True)
    for flags in (
        ("--kernel", 7),
        ("--sigma", 0.5),
        ("--grid", 4),
        ("--policy-lr", 0.5),
        ("--policy-model", "test_vit"),
    ):
        extra = ("--train-crop-size", 160, "--val-crop-size", 160, "--val-resize-size", 160) * ("test_vit" in flags)
        folder = train(policy_gradient, "--epochs", 1, *flags, *extra, name=flags[0])
        state = torch.load(folder / "checkpoint.pth", weights_only=True)
        if "--grid" in flags:
            assert state["policy_net"]["prior"].shape == (2, 1, 16)
        elif "--policy-lr" in flags:
            assert read_log(folder)[0]["lr_policy"] == 0.5
        elif "--policy-model" in flags:
            assert any("attn" in key for key in state["policy_net"])
        else:
            assert not torch.equal(state["model"]["fc.weight"], reference["model"]["fc.weight"])


@pytest.mark.slow
def test_test_only_repeats_the_last_validation(train, image_folder, capsys):
    folder = train(policy_gradient, "--epochs", 1)
    line = read_log(folder)[0]
    evaluate_only(policy_gradient, "--resume", folder / "checkpoint.pth", data=image_folder)
    assert "Heated model: pretrained on masked images" in capsys.readouterr().out
    found = json.loads((folder / "metrics.json").read_text())
    assert (found["split"], found["images"], found["heated"]) == ("val", 21, True)
    assert list(found["metrics"]["clean"]) == [*METRIC_NAMES, *CALIBRATION_NAMES]
    for name in METRIC_NAMES:
        assert found["metrics"]["clean"][name] == pytest.approx(line[f"val_{name}"], rel=1e-6, abs=1e-6)
    assert found["metrics"]["masked"]["loss"] != found["metrics"]["clean"]["loss"]
    rows = (folder / "per_class.csv").read_text().splitlines()
    assert rows[0] == "class,images,precision,recall,f1,auroc,train_images"
    assert [row.split(",")[:2] for row in rows[1:]] == [["bright", "7"], ["dark", "7"], ["striped", "7"]]
    assert (folder / "per_class_masked.csv").exists()
    images = list(csv.DictReader((folder / "predictions.csv").open()))
    assert [row["image"] for row in images] == [
        f"{name}/{n}.png" for name in ("bright", "dark", "striped") for n in range(7)
    ]
    right = [row["true_rank"] == "1" for row in images]
    assert right == [row["target"] == row["prediction"] == row["image"].split("/")[0] for row in images]
    assert sum(right) / 21 == pytest.approx(found["metrics"]["clean"]["top1"])
    masked = csv.DictReader((folder / "predictions_masked.csv").open())
    loss = sum(float(row["loss"]) for row in masked) / 21
    assert loss == pytest.approx(found["metrics"]["masked"]["loss"], abs=1e-5)
    assert "--test-only" in found["origin"]["command"]
    # The same weights, read by the other script.
    flags = ("--finetune", folder / "model_0.pth", "--output-dir", folder / "plain")
    evaluate_only(normal, *flags, data=image_folder)
    again = json.loads((folder / "plain" / "metrics.json").read_text())
    assert again["heated"]
    assert again["metrics"]["clean"] == pytest.approx(found["metrics"]["clean"], rel=1e-6, abs=1e-6)
    evaluate_only(policy_gradient, "--resume", folder / "model_0.pth", "--split", "test", data=image_folder)
    assert "holds no policy" in capsys.readouterr().out
    assert not (folder / "predictions_masked.csv").exists() and not (folder / "per_class_masked.csv").exists()
    assert json.loads((folder / "metrics.json").read_text())["images"] == 9


@pytest.mark.parametrize(
    ("head_weight", "low", "high", "fade_epochs"),
    [(0.1, 0, 1, 0), (0.4, 0.5, 2, 1)],  # as published; others, which the file tells; fading has no say here
)
def test_masked_evaluation_uses_the_mean_mask_of_the_images_own_policy(
    train, image_folder, head_weight, low, high, fade_epochs
):
    from _policy_gradient.mask import SmoothMask
    from _policy_gradient.policy import create_policy
    from utils.data.samplers import SampleKey
    from utils.data.splits import open_splits
    from utils.data.transforms import Normalize
    from utils.training.models import create_classifier
    from utils.training.start import choose_start

    forms = ("--head-weight", head_weight, "--mask-range", low, high, "--mask-fade-epochs", fade_epochs)
    folder = train(policy_gradient, "--epochs", 1, *forms)
    start = choose_start(
        policy_gradient.build_parser(), {"resume": str(folder / "checkpoint.pth"), "test_only": True,
                                         "data_path": str(image_folder)}, "_policy_gradient")  # fmt: skip
    evaluation = open_splits(start.args).evaluation
    images = torch.stack([evaluation[SampleKey(index)][0] for index in range(len(evaluation))])
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    policy = create_policy("learned", "test_resnet", 8, 32).eval()
    policy.load_state_dict(state["policy_net"])
    classifier = create_classifier("test_resnet", 3, 32).eval()
    classifier.load_state_dict(state["model"])
    with torch.no_grad():
        normalised = Normalize([0.3162], [0.3213])(images)
        head_alpha, head_beta = policy(normalised)
        prior = state["policy_net"]["prior"]
        alpha = ((1 - head_weight) * prior[0] + head_weight * head_alpha).exp()
        beta = ((1 - head_weight) * prior[1] + head_weight * head_beta).exp()
        masks = low + (high - low) * SmoothMask(32, 8, 5, 2.0)(alpha / (alpha + beta))
        loss = torch.nn.functional.cross_entropy(
            classifier(normalised * masks), torch.tensor(evaluation.targets).long()
        )
    evaluate_only(policy_gradient, "--resume", folder / "checkpoint.pth", data=image_folder)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["metrics"]["masked"]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.slow
def test_fine_tuning_from_a_heated_model_onto_other_classes(train, tmp_path, capsys):
    heated = train(policy_gradient, "--epochs", 1, name="heated") / "model_0.pth"
    body = torch.load(heated, weights_only=True)["model"]

    other = write_image_folder(tmp_path / "other", ("bright", "dark", "four", "five"))
    flags = ("--finetune", heated, "--epochs", 1, "--freeze-backbone")
    folder = train(normal, *flags, name="other_number", data=other)
    assert "3 classes instead of 4: the head is reinitialised" in capsys.readouterr().out
    found = torch.load(folder / "model_0.pth", weights_only=True)
    assert found["classes"] == ["bright", "dark", "five", "four"]
    assert found["model"]["fc.weight"].shape[0] == 4
    assert all(torch.equal(body[key], value) for key, value in found["model"].items() if not key.startswith("fc."))

    renamed = write_image_folder(tmp_path / "renamed", ("bright", "dark", "zebra"))
    folder = train(normal, *flags, name="other_names", data=renamed)
    assert "classes of other names" in capsys.readouterr().out
    with pytest.raises(UserError, match="classes of other names"):
        train(normal, "--finetune", heated, "--test-only", name="tested", data=renamed)

    folder = train(normal, "--finetune", heated, "--epochs", 1, "--lr", 1e-8, name="same")
    assert "the head is reinitialised" not in capsys.readouterr().out
    found = torch.load(folder / "model_0.pth", weights_only=True)["model"]
    torch.testing.assert_close(found["fc.weight"], body["fc.weight"], rtol=0, atol=1e-5)


def test_freeze_backbone_trains_the_head_only(train):
    start = train(normal, "--epochs", 1, name="start") / "model_0.pth"
    folder = train(
        normal,
        "--finetune",
        start,
        "--epochs",
        1,
        "--freeze-backbone",
        name="frozen",
    )
    before, after = (torch.load(path, weights_only=True)["model"] for path in (start, folder / "model_0.pth"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_flags_of_the_loss_change_the_first_loss(train):
    plain = read_log(train(normal, "--epochs", 1, name="plain"))[0]["train_loss"]
    for flags in (("--label-smoothing", 0.3), ("--mixup-alpha", 0.4), ("--cutmix-alpha", 1.0)):
        assert read_log(train(normal, "--epochs", 1, *flags, name=flags[0]))[0]["train_loss"] != plain
        assert math.isfinite(
            read_log(train(policy_gradient, "--epochs", 1, *flags, name=f"p{flags[0]}"))[0]["train_loss"]
        )


def test_print_freq_sets_the_number_of_lines(train, capsys):
    def lines(*flags, name):
        capsys.readouterr()
        train(normal, "--epochs", 1, *flags, name=name)
        return [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 0 [")]

    assert lines("--print-freq", 3, name="three") == ["epoch 0 [3/4]", "epoch 0 [4/4]"]
    assert lines("--print-freq", 1, name="one") == [f"epoch 0 [{step}/4]" for step in (1, 2, 3, 4)]


@pytest.mark.slow
def test_mixed_precision_runs(train):
    """bf16 and fp16 see the float32 run's losses (at a rate too small to matter): the masks are float32 throughout."""
    flags = ("--epochs", 1, "--lr", 1e-6)
    for script, more in ((normal, ()), (policy_gradient, ("--mask-policy", "uniform")), (policy_gradient, ())):
        name = f"{script.SCRIPT}{len(more)}"
        plain = read_log(train(script, *flags, *more, name=name))[0]
        for dtype in ("bf16", "fp16"):
            line = read_log(train(script, *flags, *more, "--amp", "--amp-dtype", dtype, name=f"{name}{dtype}"))[0]
            # Concentrations that differ in the last digits give other samples: the learned masks are not the same ones.
            closeness = 0.05 if script is policy_gradient and not more else 0.01
            assert line["train_loss"] == pytest.approx(plain["train_loss"], rel=closeness)
            assert line["train_loss"] != plain["train_loss"]
            assert ("skipped_steps" in line) == (dtype == "fp16")


@pytest.mark.slow
def test_compiled_run_has_clean_keys_and_the_same_losses(train):
    plain = read_log(train(normal, "--epochs", 1, "--lr", 1e-3, name="plain"))[0]
    folder = train(normal, "--epochs", 1, "--lr", 1e-3, "--compile", name="compiled")
    assert read_log(folder)[0]["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert not any("_orig_mod" in key for key in state["model"])


@pytest.mark.slow
def test_traced_policy_and_classifier_have_clean_keys_and_the_same_losses(train, monkeypatch):
    """As `--compile`, but for the code generation, which takes a minute a network."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compile_module(module, backend="aot_eager"))
    flags = ("--epochs", 1, "--lr", 1e-3, "--objective", "reinforce")
    plain = read_log(train(policy_gradient, *flags, name="plain"))[0]
    folder = train(policy_gradient, *flags, "--compile", name="compiled")
    assert read_log(folder)[0]["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    for part in ("model", "policy_net"):
        assert not any("_orig_mod" in key for key in state[part])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(train):
    folder = train(normal, "--epochs", 1, "--lr", 1e-4)
    before = (folder / "checkpoint.pth").read_bytes()
    with pytest.raises(UserError, match=r"not finite at epoch \d+, step \d+"):
        train(normal, "--epochs", 60, "--lr", 1e18, "--wd", 0, "--print-freq", 1, name="diverging")
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    state["model"]["fc.bias"][0] = float("nan")
    checkpoint.save(folder / "poisoned.pth", state)
    with pytest.raises(UserError, match=r"poisoned.pth: its 'fc.bias' holds NaN or infinite values"):
        normal.main(["--resume", str(folder / "poisoned.pth"), "--epochs", "2", "--device", "cpu"])
    assert (folder / "checkpoint.pth").read_bytes() == before
    assert len(read_log(folder)) == 1

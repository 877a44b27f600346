"""The mask gallery: what is chosen and computed, what the pictures hold, and the policy before training."""

import copy
import shutil

import numpy as np
import pytest
import torch

from _policy_gradient import gallery, train
from _policy_gradient.gallery import Examples, choose_examples, draw_stages, run_policy
from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import build_policy
from _policy_gradient.policy import create_policy
from tests.conftest import SMALL_POLICY, write_image_folder
from tests.helpers.runs import assert_same
from utils.checkpoints import checkpoint
from utils.data.dataset import ImageFolder
from utils.data.transforms import Normalize, evaluation_transform
from utils.results import figures
from utils.results.figures import in_lines
from utils.results.mask_gallery import Row, draw_gallery
from utils.runtime.errors import UserError

MASK, NORMALIZE = SmoothMask(32, 8, 5, 2.0), Normalize([0.3], [0.25])


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(figures, "DOTS_PER_INCH", 30)


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """An epoch of training, and the policy that it began with."""
    began, build = [], build_policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_policy", lambda *args: began.append(build(*args)) or copy.deepcopy(began[0]))
        folder = tmp_path_factory.mktemp("run")
        flags = [*SMALL_POLICY, "--data-path", str(image_folder), "--epochs", "1", "--lr", "0.01", "--seed", "3"]
        train.main([*flags, "--output-dir", str(folder)])
    return folder, began[0]


@pytest.fixture
def split(image_folder):
    return ImageFolder(image_folder / "val", evaluation_transform(36, 32))


def policy_of(name):
    torch.manual_seed(5)
    return create_policy(name, "test_resnet", 8, 32)


def test_the_first_image_of_each_class_is_chosen(split):
    chosen = choose_examples(split)
    assert chosen.names == ["bright/0.png", "dark/0.png", "striped/0.png"]
    assert chosen.indices == [0, 7, 14]
    assert torch.equal(chosen.images[1], split.transform(split.read(7)))
    assert choose_examples(split, ["striped", "dark"], 2).indices == [14, 15, 7, 8]
    assert choose_examples(split, ["dark"], 50).indices == list(range(7, 14))
    with pytest.raises(UserError, match=r"--classes blue: .*/val has no such class"):
        choose_examples(split, ["dark", "blue"])


def test_of_many_classes_sixteen_are_chosen_evenly(tmp_path):
    write_image_folder(tmp_path, classes=tuple(f"{number:02d}" for number in range(31)), images=1)
    chosen = choose_examples(ImageFolder(tmp_path / "val", evaluation_transform(36, 32)))
    assert chosen.names == [f"{number:02d}/0.png" for number in range(0, 31, 2)]


def test_images_that_cannot_be_read_are_passed_over(image_folder, tmp_path):
    shutil.copytree(image_folder / "val", tmp_path / "val")
    (tmp_path / "val" / "dark" / "0.png").write_text("no image")
    split = ImageFolder(tmp_path / "val", evaluation_transform(36, 32))
    assert choose_examples(split).indices == [0, 8, 14]
    for path in (tmp_path / "val" / "dark").iterdir():
        path.write_text("no image")
    with pytest.raises(UserError, match=r"dark/6.png: cannot be read as an image"):
        choose_examples(split)


@pytest.mark.parametrize("name", ["learned", "prior", "uniform"])
def test_a_stage_holds_what_evaluation_and_training_compute(name, split):
    policy, chosen = policy_of(name), choose_examples(split)
    stage = run_policy(policy, MASK, NORMALIZE, chosen, seed=1, epochs_done=2)
    images = NORMALIZE(chosen.images)
    with torch.no_grad():
        means = policy.eval().mean_cells(images)
    assert np.allclose(stage.means.reshape(3, 64), means, atol=1e-6)
    prior = policy.prior.exp()
    assert np.allclose(stage.prior.reshape(3, 64), prior[0] / prior.sum(0))  # alpha / (alpha + beta)
    masks = MASK(torch.from_numpy(stage.cells).view(3, 64))[:, 0]
    assert np.allclose(stage.masks, masks, atol=1e-6)
    masked = (images * masks[:, None]) * 0.25 + 0.3  # as pixels
    assert np.allclose(stage.masked, masked.permute(0, 2, 3, 1), atol=1e-5)
    assert (stage.cells > 0).all() and (stage.cells < 1).all()


def test_cells_depend_on_seed_epoch_and_image_only(split):
    policy, chosen = policy_of("uniform"), choose_examples(split)
    cells = run_policy(policy, MASK, NORMALIZE, chosen, 1, 2).cells
    assert np.array_equal(run_policy(policy, MASK, NORMALIZE, chosen, 1, 2).cells, cells)
    last = Examples(chosen.names[2:], chosen.indices[2:], chosen.images[2:])
    assert np.array_equal(run_policy(policy, MASK, NORMALIZE, last, 1, 2).cells[0], cells[2])
    assert not np.array_equal(cells[0], cells[1])
    for seed, epochs in ((2, 2), (1, 3)):
        assert not np.array_equal(run_policy(policy, MASK, NORMALIZE, chosen, seed, epochs).cells, cells)


def test_the_training_does_not_move(split):
    """Generators, weights, statistics, modes and gradients of the policy are what they were."""
    policy = policy_of("learned").train()
    policy.heads.backbone.eval()  # whatever it was
    sum(output.sum() for output in policy(torch.randn(4, 3, 32, 32))).backward()
    before = copy.deepcopy(policy.state_dict()), torch.get_rng_state(), [m.training for m in policy.modules()]
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    gallery.draw_policy(policy, split, MASK, NORMALIZE, seed=0, epochs_done=1)
    assert_same(before, (policy.state_dict(), torch.get_rng_state(), [m.training for m in policy.modules()]))
    assert_same(gradients, [parameter.grad for parameter in policy.parameters()])


def test_a_compiled_policy_is_run_as_it_is(split):
    policy, chosen = policy_of("learned"), choose_examples(split)
    expected = run_policy(policy, MASK, NORMALIZE, chosen, 1, 2)
    policy.heads.compile(backend=lambda *_: pytest.fail("was compiled"))
    assert_same([*map(torch.from_numpy, run_policy(policy, MASK, NORMALIZE, chosen, 1, 2))],
                [*map(torch.from_numpy, expected)])  # fmt: skip


def test_the_figure_holds_the_arrays(split):
    chosen = choose_examples(split)
    stage = run_policy(policy_of("learned"), MASK, NORMALIZE, chosen, 1, 2)
    figure = draw_stages(chosen, {"before": np.full((8, 8), 0.25), "after": stage}, NORMALIZE, "$title_")
    first, *pictures = [axes for axes in figure.axes if axes.images]
    assert np.array_equal(first.images[0].get_array(), np.full((8, 8), 0.25))
    assert len(pictures) == 3 * 5
    headings = ["image", "prior's means", "image's means\n$-$ prior's means", "sampled mask", r"image $\times$ mask"]
    assert [axes.get_title() for axes in [first, *pictures]] == [headings[1], *headings] + [""] * 10
    assert [axes.get_ylabel() for axes in pictures[::5]] == chosen.names
    row = [axes.images[0] for axes in pictures[5:10]]
    pixels = chosen.images[1].permute(1, 2, 0).numpy() / 255
    expected = [pixels, stage.prior[1], stage.means[1] - stage.prior[1], stage.masks[1], stage.masked[1]]
    for picture, array in zip(row, expected, strict=True):
        assert np.allclose(picture.get_array(), array, atol=1e-6)
    assert first.images[0].get_clim() == row[1].get_clim() == (0.25, 0.75)  # shared, symmetric about 0.5
    largest = np.abs(stage.means - stage.prior).max()
    assert 0.001 < largest < 0.25  # far smaller than the scale of the means
    assert row[2].get_clim() == pytest.approx((-largest, largest))
    reach = np.abs(stage.masks - 0.5).max()
    assert row[3].get_clim() == pytest.approx((0.5 - reach, 0.5 + reach))
    assert [text.get_text() for text in figure.texts] == ["before, only the prior", "after", r"\$title_"]
    ends = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in figure.axes[16:]]
    assert ends[:2] == [["0.25", "0.50", "0.75"], [f"\N{MINUS SIGN}{largest:.3f}", "0", f"+{largest:.3f}"]]


def test_masks_of_another_range_are_shown_as_applied(split):
    mask = SmoothMask(32, 8, 5, 2.0, 0.5, 2.0)
    policy, chosen = policy_of("uniform"), choose_examples(split)
    plain, stage = (run_policy(policy, one, NORMALIZE, chosen, 0, 1) for one in (MASK, mask))
    assert np.array_equal(stage.cells, plain.cells)
    assert np.allclose(stage.masks, 0.5 + 1.5 * plain.masks, atol=1e-6)
    figure = gallery.draw_policy(policy, split, mask, NORMALIZE, seed=0, epochs_done=1)
    row = [axes.images[0] for axes in figure.axes[:5]]
    assert np.array_equal(np.asarray(row[3].get_array()), stage.masks[0])
    reach = np.abs(stage.masks - 1.25).max()
    assert row[3].get_clim() == pytest.approx((1.25 - reach, 1.25 + reach))  # about the middle of the range
    assert row[1].get_clim() == pytest.approx((0.49, 0.51))
    assert row[2].get_clim() == (-0.001, 0.001)  # of pictures all alike
    middles = [axes.get_xticklabels()[1].get_text() for axes in figure.axes[15:]]
    assert middles == ["0.50", "0", "1.25"]


def test_pictures_do_not_overlap():
    picture = np.full((4, 4), 0.5)
    row = Row("x", picture, picture, picture, picture, picture)
    figure = draw_gallery({"one": [row, row], "two": [row, row, row]}, "")
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == 5 * 5 + 3
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_names_in_lines():
    assert in_lines("us-breast-carcinoma/00000.png", 16) == "us-breast-\ncarcinoma/\n00000.png"
    assert in_lines("a" * 20, 16) == "a" * 16 + "\n" + "a" * 4
    assert in_lines("$\udcff", 16) == r"\$\udcff"
    assert in_lines("-".join("abcdefgh" * 9), 16).count("\n") == 3


# --- The command


def test_the_policy_before_training_is_rebuilt_bit_for_bit(run, image_folder):
    folder, began = run
    args, state = gallery.read_run(folder / checkpoint.CHECKPOINT, None, "val")
    assert_same(gallery.initial_policy(args, state).state_dict(), began.state_dict())
    assert not torch.equal(state["policy_net"]["prior"], began.prior)
    state["policy_net"]["initial_prior"][0, 0, 0] += 1e-6
    assert gallery.initial_policy(args, state) is None


def test_the_command_shows_before_and_after(run, image_folder, monkeypatch, capsys, tmp_path):
    folder, began = run
    drawn = []
    monkeypatch.setattr(gallery, "draw_stages", lambda *args: drawn.append(args))
    monkeypatch.setattr(figures, "write_figure", lambda path, _: drawn.append(path))
    flags = [str(folder), "--split", "test", "--classes", "dark,bright", "-o", str(tmp_path / "x.png")]
    gallery.main(flags)
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}\n"
    (chosen, stages, normalize, title, mask_range), path = drawn
    assert (chosen.names, list(stages)) == (["dark/0.png", "bright/0.png"], ["before training", "after 1 epoch"])
    assert (title, path, mask_range) == (f"Masks of test images: {folder}", tmp_path / "x.png", [0, 1])
    now = copy.deepcopy(began)
    now.load_state_dict(torch.load(folder / "checkpoint.pth", weights_only=True)["policy_net"])
    for policy, stage, epochs in zip((began, now), stages.values(), (0, 1), strict=True):
        for one, other in zip(run_policy(policy, MASK, normalize, chosen, 3, epochs), stage, strict=True):
            assert np.array_equal(one, other)
    with pytest.raises(UserError, match=r"--classes : .* has no such class"):
        gallery.main([*flags[:-4], "--classes", ""])


@pytest.mark.slow
def test_the_prior_is_shown_if_the_first_policy_cannot_be_rebuilt(run, tmp_path, capsys, monkeypatch):
    state = torch.load(run[0] / "checkpoint.pth", weights_only=True)
    state["policy_net"]["initial_prior"] = torch.zeros(2, 1, 64)
    checkpoint.save(tmp_path / "checkpoint.pth", state)
    drawn = []
    draw = gallery.draw_stages
    monkeypatch.setattr(gallery, "draw_stages", lambda *args: drawn.append(args) or draw(*args))
    gallery.main([str(tmp_path)])
    assert (tmp_path / "plots" / "masks_val.png").exists()
    assert "first weights cannot be rebuilt" in capsys.readouterr().out
    stages = drawn[0][1]
    assert np.array_equal(stages["before training"], np.full((8, 8), 0.5))
    assert isinstance(stages["after 1 epoch"], gallery.Stage)


def test_what_has_no_masks_to_show_is_one_sentence(run, image_folder, tmp_path):
    folder = run[0]
    advice = "give a run of _policy_gradient/train.py, or its checkpoint.pth: only these hold masks to show"

    def write_checkpoint(folder):
        path = folder / "normal.pth"
        state = torch.load(run[0] / "checkpoint.pth", weights_only=True)
        checkpoint.save(path, state | {"script": "_normal"})
        return path

    for source, message in (
        (tmp_path, r"checkpoint.pth: no such file"),
        (folder / "model_0.pth", f"holds weights but no full training state; {advice}"),
        (write_checkpoint(tmp_path), f"is a checkpoint of _normal/train.py; {advice}"),
    ):
        with pytest.raises(UserError, match=message):
            gallery.main([str(source), "-o", str(tmp_path / "x.png")])
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    del state["policy_net"], state["optimizers"]["policy"]
    state["args"]["mask_policy"] = "none"
    checkpoint.save(tmp_path / "none.pth", state)
    with pytest.raises(UserError, match=r"none.pth: is of a run with --mask-policy none, which has no masks to show"):
        gallery.main([str(tmp_path / "none.pth")])

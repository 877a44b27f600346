"""The report page of runs that finished, were interrupted or were damaged, and in a real browser."""

import base64
import json
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_image
from tests.helpers.audits import picture, put
from tests.helpers.audits import run as audit_images
from tests.helpers.finished_runs import CLASSES, undrawn, write_run, write_test  # noqa: F401
from utils import report
from utils.results.templates import three_digits
from utils.runtime.errors import UserError

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def page_of(*folders: Path) -> str:
    """The page with single spaces."""
    return " ".join(report.page([report.read_run_folder(folder) for folder in folders]).decode().split())


@pytest.mark.slow
def test_a_page_of_a_finished_run(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    for text in ("Report of run", "Finished; 3 epochs in the log", "0.667", "_policy_gradient/train.py --lr 0.1",
                 "torch 2.14.1", "commit 0123456789ab", "8 processes on a GPU", "/data/train",
                 "Pretraining on masked images; 97 training images, 3 classes.", "Health of the policy",
                 "its 95 % bootstrap",
                 "Highest macro F1 on val: 0.625, after epoch 1.", "test, without masks, weights model_best.pth",
                 '<td>train</td><td class="number">97</td><td class="number">3</td> <td class="number">7</td>',
                 '<td>us-breast-cyst</td><td class="number">7</td>'):  # fmt: skip
        assert text in page, text
    assert "mr-&lt;b&gt;brain&lt;/b&gt;" in page
    assert "<b>brain" not in page
    for external in ("http:", "https:", ' src="/', "@import", "url("):
        assert external not in page.replace("http://www.w3.org", ""), external


def describe(folder: Path) -> dict:
    now = datetime.fromisoformat("2026-11-25T13:30:00+00:00")
    return report.describe_run("run", report.read_run_folder(folder), now)


def test_metrics_have_the_intervals_of_the_file_and_classes_their_commonest_confusion(tmp_path):
    run = report.read_run_folder(write_run(tmp_path / "run"))
    run.evaluations["clean"].metrics["auroc"] = None
    run.tested["intervals"]["clean"]["top1"] = [0.25, 0.75]
    evaluation = report.describe_run("run", run, datetime.now().astimezone())["evaluations"][0]
    assert [row["confused"] for row in evaluation["table"]] == [
        "us-breast-cyst (1)", "ct-head-normal (1)", "ct-head-normal (2)"
    ]  # fmt: skip
    metrics = evaluation["metrics"]
    assert list(metrics) == ["top1", "top5", "balanced_accuracy", "precision", "f1", "loss", "ece", "brier"]
    assert metrics["top1"] == {"value": 8 / 12, "interval": [0.25, 0.75]}


# Summary


@pytest.mark.usefixtures("undrawn")
def test_the_summary_shows_the_test_else_the_best_validation(tmp_path):
    run = describe(write_run(tmp_path / "tested"))
    assert run["result"]["of"] == "test, without masks, weights model_best.pth"
    precision, recall = (5 / 8, 2 / 2, 1 / 2), (5 / 6, 2 / 3, 1 / 3)
    f1 = sum(2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)) / 3
    assert run["result"]["value"] == pytest.approx(f1)
    assert run["result"]["interval"][0] < f1 < run["result"]["interval"][1]
    untested = describe(write_run(tmp_path / "untested", tested=False))
    assert (untested["result"]["value"], untested["result"]["interval"]) == (0.625, None)
    assert untested["result"]["of"] == "val, without masks, best of 3 epochs (epoch 1)"
    log = (tmp_path / "untested" / "log.jsonl").read_text()
    (tmp_path / "untested" / "log.jsonl").write_text(log.replace('"val_f1": 0.5,', ""))  # as with --val-every 2
    assert describe(tmp_path / "untested")["result"]["of"].endswith("best of 2 validated epochs (epoch 1)")
    assert run["state"].endswith("last saved after 3 epochs, 2026-11-23 11:00 UTC (2 days 2 h before this report).")
    assert [start["when"] for start in run["starts"]] == ["2026-11-23 10:00 UTC (2 days 3 h before this report)"] * 2


def labels(folder: Path, **changes: object) -> list[str]:
    """The labels of the warnings. changes: of metrics.json."""
    content = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(content | changes))
    return [label for label, _ in describe(folder)["warnings"]]


@pytest.mark.usefixtures("undrawn")
def test_the_summary_warns(tmp_path):
    heated, plain = write_run(tmp_path / "heated"), write_run(tmp_path / "plain", policy=False)
    assert labels(heated) == ["Heated model", "Few images"]
    assert labels(heated, heated=False) == labels(plain) == ["Few images"]
    assert labels(plain, split="val", intervals={}) == ["Validation, not test", "Few images", "No intervals"]
    warnings = dict(describe(plain)["warnings"])
    assert warnings["Validation, not test"].startswith("The results are those of val, and the epoch was chosen by them")
    assert warnings["Few images"] == (
        "12 images in all: see the intervals. 3 classes have fewer than 10 (the smallest: 3): too few for a result per "
        "class."
    )
    many = torch.eye(2).repeat(300, 1)
    write_test(plain, many, torch.tensor([0, 1] * 300), ["a", "b"])
    assert labels(plain) == []
    status = {"status": "interrupted", "epoch": 1, "step": 2, "message": "", "time": "no time"}
    (plain / "status.json").write_text(json.dumps(status))
    assert labels(plain) == ["Unfinished"]
    assert (
        describe(plain)["state"] == "Interrupted; 3 epochs in the log; last saved after 1 epoch and 2 steps, no time."
    )


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("_normal/train.py --model resnet18 --finetune a/b.pth", "Fine-tuning of resnet18 from a/b.pth"),
        (
            "_normal/train.py --model=resnet18 --weights a1_in1k",
            "Training of resnet18 from pretrained weights (a1_in1k)",
        ),
        ("_normal/train.py", "Training from scratch"),
        ("_policy_gradient/train.py --mask-policy none", "Pretraining without masks"),
        ("_policy_gradient/train.py --mask-policy uniform", "Pretraining on masked images"),
        ("", None),
        ("'", None),
    ],
)
def test_the_summary_says_what_was_trained(tmp_path, command, what):
    run = report.read_run_folder(write_run(tmp_path / "run"))
    run.origin["starts"][0]["command"] = command
    described = report.describe_training(run)
    expected = "Unknown training: run.json holds no command."
    assert described == (expected if what is None else f"{what}; 97 training images, 3 classes.")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11-25T13:29:15+00:00", "2026-11-25 13:29 UTC (45 s before this report)"),
        ("2026-11-25T12:20:00+01:00", "2026-11-25 12:20 UTC+01:00 (2 h 10 min before this report)"),
        ("2027-01-01T00:00:00+00:00", "2027-01-01 00:00 UTC"),
        ("2026-11-25T13:29:15", "2026-11-25T13:29:15"),
        ("yesterday", "yesterday"),
        ("9999-99-99", "9999-99-99"),
    ],
)
def test_times_are_absolute_and_relative(text, shown):
    assert report.describe_time(text, datetime.fromisoformat("2026-11-25T13:30:00+00:00")) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.66667, "0.667"), (0.031249, "0.0312"), (1.0, "1.00"), (0, "0"), (5312.4, "5,312"), (1.5e-7, "1.50e-07"),
     (None, "\N{EN DASH}"), ("x", "\N{EN DASH}")],
)  # fmt: skip
def test_numbers_have_three_digits(value, shown):
    assert three_digits(value) == shown


# Sections


def test_the_galleries_before_training_and_of_the_last_epoch(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("masks_before", "masks_2", "masks_9", "masks_10"):
        write_image(folder / "plots" / f"{name}.png", np.zeros((2, 2)))
    (folder / "plots" / "masks_10.png").write_bytes(b"the last")
    galleries = report.mask_galleries(folder)
    assert [gallery["title"] for gallery in galleries] == ["Masks before training", "Masks after epoch 10"]
    assert galleries[1]["source"] == "data:image/png;base64," + base64.b64encode(b"the last").decode()


@pytest.mark.usefixtures("undrawn")
def test_several_runs_share_a_table_and_curves(tmp_path):
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", policy=False, epochs=2)]
    page = page_of(*runs)
    assert "Report of 2 runs" in page
    assert page.count("<td>a/run</td>") == page.count("<td>b/run</td>") == 1
    assert page.count("<h2>a/run</h2>") == 1 and '<a href="#run-2">b/run</a>' in page
    assert page.count('alt="Learning curves"') == 1


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_shows_what_it_has(tmp_path):
    folder = write_run(tmp_path / "run", epochs=1, tested=False)
    status = {"status": "running", "epoch": 0, "step": 40, "message": "", "time": "2026-11-23T11:00:00+00:00"}
    (folder / "status.json").write_text(json.dumps(status))
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"epoch": 1, "train_lo')
    page = page_of(folder)
    assert "Killed: it no longer holds the lock of its folder; 1 epoch in the log; last saved after 0 epochs" in page
    assert "<strong>Not tested.</strong>" in page
    for name in ("log.jsonl", "status.json"):
        (folder / name).unlink()
    page = page_of(folder)
    assert "No epoch has finished yet" in page and "there is no status.json" in page
    assert "_policy_gradient/train.py --lr 0.1" in page


@pytest.mark.usefixtures("undrawn")
def test_a_run_with_only_damaged_files_still_gets_a_page(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("run.json", "metrics.json", "status.json", "log.jsonl"):
        (folder / name).write_text("{}\n")
    page = page_of(folder)
    for name in ("run.json", "metrics.json", "log.jsonl"):
        assert str(folder / name) in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: no such folder; expected the --output-dir of a run"),
        (["."], r"holds no run \(no log\.jsonl, run\.json or metrics\.json\)"),
        (["run", "-o", "run/checkpoint.pth"], r"checkpoint\.pth: expected a name that ends in \.html"),
        (["run", "run/"], "a folder is given twice"),
        (["run", "-o", "page.html"], "page.html: already exists and is not a report of this command"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", tested=False)
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match=message):
        report.main(arguments)
    assert [path.read_text() for path in tmp_path.rglob("*.html")] == ["mine"]


@pytest.mark.usefixtures("undrawn")
def test_untested_runs_and_different_classes_are_marked(tmp_path):
    tested, untested = write_run(tmp_path / "tested"), write_run(tmp_path / "untested", tested=False)
    page = page_of(tested, untested)
    assert "<td>untested</td><td>not tested</td>" in page
    assert "<td>test, without masks, weights model_best.pth</td>" in page
    assert "not comparable" not in page
    write_test(untested, torch.eye(2), torch.tensor([0, 1]), ["a", "b"])
    assert "have different classes: their numbers are not comparable" in page_of(tested, untested)


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_and_replaces_its_page(tmp_path, capsys):
    folder = write_run(tmp_path / "run", epochs=1, tested=False)
    for _ in range(2):
        report.main([str(folder)])
        assert capsys.readouterr().out == f"{folder / 'report.html'}: 1 run\n"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium, with a function that opens a page at a width."""
    selenium = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no Chromium with its driver here (Debian: chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))

    def open_page(path: Path, width: int):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get_log("performance")  # forget earlier events
        driver.get(path.as_uri())
        return driver

    yield open_page
    driver.quit()


@pytest.mark.slow
def test_a_page_works_in_a_browser(browser, tmp_path):
    """The page loads nothing from a network, fits a narrow screen, shows all its pictures, and sorts its tables."""
    report.main([str(write_run(tmp_path / "run"))])
    page = tmp_path / "run" / "report.html"
    for width in (1280, 400):
        driver = browser(page, width)
        assert driver.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        schemes = {event["params"]["request"]["url"].split(":")[0] for event in events
                   if event["method"] == "Network.requestWillBeSent"}  # fmt: skip
        assert schemes <= {"file", "data"}
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        shown = driver.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert len(shown) == 6 and all(shown)  # curves, the policy, confusion, recall, its frequency, reliability
        hints = driver.execute_script("return [...document.querySelectorAll('.scroll')].map(box => "
            "[box.scrollWidth > box.clientWidth + 1, box.classList.contains('wide')])")  # fmt: skip
        assert all(overflows == hinted for overflows, hinted in hints)
        assert any(hinted for _, hinted in hints) == (width == 400)
    column = "return [...document.querySelectorAll('table.classes tbody tr')].map(row => row.cells[{}].textContent)"
    button = "document.querySelectorAll('table.classes th button')[{}].click()"
    for cell, ascending in ((4, ["0.333", "0.667", "0.833"]), (1, ["3", "3", "6"]), (0, CLASSES)):
        driver.execute_script(button.format(cell))
        assert driver.execute_script(column.format(cell)) == ascending
        driver.execute_script(button.format(cell))
        assert driver.execute_script(column.format(cell)) == ascending[::-1]
    assert (
        driver.execute_script("return document.querySelector('table.classes th[aria-sort]').ariaSort") == "descending"
    )
    for name in ("train/a/0", "train/b/0", "train/b/1", "val/a/0", "val/b/0"):
        put(tmp_path / "data" / f"{name}.png", picture(len(name) + ord(name[-3])))
    audit_images(tmp_path / "data", tmp_path)
    driver = browser(tmp_path / "out" / "report.html", 400)
    assert driver.get_log("browser") == []
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 400
    pdf = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")

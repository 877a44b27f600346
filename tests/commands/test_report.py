"""The report page: what it shows of runs that finished, that were cut off, that were damaged, and in a real browser."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_image
from tests.helpers.finished_runs import CLASSES, write_result, write_run
from utils import report
from utils.runtime.errors import UserError

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def page_of(*folders: Path) -> str:
    return report.page([report.read_run_folder(folder) for folder in folders]).decode()


def test_a_finished_run(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    for text in ("Report of run", "Finished; 3 epochs in the log", "0.6667", "_policy_gradient/train.py --lr 0.1",
                 "torch 9.8.7", "commit 0123456789ab", "8 processes on a GPU", "/data/train",
                 "highest macro F1 0.6250 after epoch 1",
                 "The policy over the epochs", "a 95% percentile bootstrap"):  # fmt: skip
        assert text in " ".join(page.split()), text
    assert "mr-&lt;b&gt;brain&lt;/b&gt;" in page
    assert "<b>brain" not in page
    for outside in ("http:", "https:", ' src="/', "@import", "url("):
        assert outside not in page.replace("http://www.w3.org", ""), outside


def test_each_class_with_its_commonest_confusion(tmp_path):
    run = report.read_run_folder(write_run(tmp_path / "run"))
    evaluation = report.describe_run("run", run)["evaluations"][0]
    assert [row["confused"] for row in evaluation["table"]] == [
        "us-breast-cyst (1)", "ct-head-normal (1)", "ct-head-normal (2)"
    ]  # fmt: skip
    metrics = evaluation["metrics"]
    assert list(metrics) == ["top1", "f1", "loss"]  # AUROC is undefined here
    assert metrics["top1"]["value"] == 8 / 12
    lower, upper = metrics["top1"]["interval"]
    assert lower == pytest.approx(5 / 12, abs=0.1) and upper == pytest.approx(11 / 12, abs=0.1)


def test_the_gallery_before_the_training_and_of_the_last_epoch(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("masks_before", "masks_2", "masks_9", "masks_10"):
        write_image(folder / "plots" / f"{name}.png", np.zeros((2, 2)))
    (folder / "plots" / "masks_10.png").write_bytes(b"the last")
    found = report.galleries(folder)
    assert [one["title"] for one in found] == ["Masks before the training", "Masks after epoch 10"]
    assert found[1]["source"] == "data:image/png;base64," + base64.b64encode(b"the last").decode()


def test_several_runs_share_a_table_and_curves(tmp_path):
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", policy=False, epochs=2)]
    page = page_of(*runs)
    assert "Report of 2 runs" in page
    assert page.count("<td>a/run</td>") == page.count("<td>b/run</td>") == 1
    assert page.count('alt="Learning curves"') == 1


def test_a_run_that_was_cut_off_shows_what_is_there(tmp_path):
    folder = write_run(tmp_path / "run", epochs=1, tested=False)
    status = {"status": "running", "epoch": 0, "step": 40, "message": "", "time": "2026-11-23T11:00:00+00:00"}
    (folder / "status.json").write_text(json.dumps(status))
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"epoch": 1, "train_lo')
    page = " ".join(page_of(folder).split())
    assert (
        "Killed: it no longer holds the lock of its folder; 1 epoch in the log; last saved with 0 epochs and 40" in page
    )
    assert "Not tested yet" in page
    for name in ("log.jsonl", "status.json"):
        (folder / name).unlink()
    page = " ".join(page_of(folder).split())
    assert "No epoch is done yet" in page and "there is no status.json" in page
    assert "_policy_gradient/train.py --lr 0.1" in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", '{"starts": [{}], "data": {}}'),
        ("run.json", '{"starts": [], "data": {"train": 3}}'),
        ("run.json", "[" * 100_000),
        ("metrics.json", '{"metrics": {"clean": {"top1": "<script>"}}, "split": "", "weights": ""}'),
        ("metrics.json", '{"metrics": {}, "split": "", "weights": "", "averaged": []}'),
        ("metrics.json", '{"metrics": {}}'),
        ("status.json", "[1]"),
        ("log.jsonl", "no JSON\n"),
        ("log.jsonl", None),
        ("per_class.csv", "class,images\na,1\n"),
        ("predictions.csv", "target,prediction,true_rank,loss\nno-such-class,ct-head-normal,1,0\n"),
        ("predictions.csv", "target,prediction,true_rank,loss\nct-head-normal,ct-head-normal,1,0\n"),
        ("predictions.csv", ""),
    ],
)
def test_a_damaged_file_is_named(name, content, tmp_path):
    folder = write_run(tmp_path / "run")
    if content is None:  # a folder in its place
        (folder / name).unlink()
        (folder / name).mkdir()
    else:
        (folder / name).write_text(content)
    (note,) = report.read_run_folder(folder).notes
    assert str(folder / name) in note


def test_of_a_run_whose_files_are_all_damaged_a_page_is_made_all_the_same(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("run.json", "metrics.json", "status.json", "log.jsonl"):
        (folder / name).write_text("{}\n")
    page = page_of(folder)
    for name in ("run.json", "metrics.json", "log.jsonl"):
        assert str(folder / name) in page


def test_bad_input_is_one_sentence(tmp_path):
    folder = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="no_run: no such folder; expected the --output-dir of a run"):
        report.main([str(tmp_path / "no_run")])
    with pytest.raises(UserError, match=r"holds no run, neither log\.jsonl nor run\.json nor metrics\.json"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match=r"checkpoint\.pth: expected a name that ends in \.html"):
        report.main([str(folder), "-o", str(folder / "checkpoint.pth")])
    with pytest.raises(UserError, match="a folder is named twice"):
        report.main([str(folder), f"{folder}/"])
    assert not list(tmp_path.rglob("*.html"))


def test_untested_runs_and_other_classes_are_said(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", tested=False)
    page = " ".join(page_of(one, other).split())
    assert "<td>other</td><td>not tested</td>" in page
    assert "<td>test, without masks, weights w.pth</td>" in page
    assert "do not compare" not in page
    write_result(other, json.loads((one / "metrics.json").read_text())["origin"])
    for name in ("per_class.csv", "predictions.csv"):
        (other / name).write_text((other / name).read_text().replace("ct-head-normal", "ct-head-fine"))
    assert "tell other classes apart: their numbers do not compare" in page_of(one, other)


def test_weights_chosen_on_the_split_are_called_so(tmp_path):
    folder = write_run(tmp_path / "run")
    content = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(content | {"split": "val", "weights": "a/model_best.pth"}))
    assert "val, without masks, weights model_best.pth (chosen on this split)" in page_of(folder)


def test_a_page_of_another_kind_is_not_written_over(tmp_path):
    folder, page = write_run(tmp_path / "run", tested=False), tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(UserError, match="is there and is no report of this command"):
        report.main([str(folder), "-o", str(page)])
    assert page.read_text() == "mine"
    page.unlink()
    for _ in range(2):
        report.main([str(folder), "-o", str(page)])


def test_the_command_writes_into_the_runs_folder(tmp_path, capsys):
    folder = write_run(tmp_path / "run", epochs=1, tested=False)
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
        driver.get_log("performance")  # what came before
        driver.get(path.as_uri())
        return driver

    yield open_page
    driver.quit()


@pytest.mark.slow
def test_in_a_browser(browser, tmp_path):
    """Nothing is asked of a network, nothing sticks out on a narrow screen, all pictures show, and tables sort."""
    report.main([str(write_run(tmp_path / "run"))])
    page = tmp_path / "run" / "report.html"
    for width in (1280, 400):
        driver = browser(page, width)
        assert driver.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = {event["params"]["request"]["url"].split(":")[0] for event in events
                 if event["method"] == "Network.requestWillBeSent"}  # fmt: skip
        assert asked <= {"file", "data"}
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        shown = driver.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert len(shown) == 4 and all(shown)  # curves, the policy, confusion, recall
    column = "return [...document.querySelectorAll('table.classes tbody tr')].map(row => row.cells[{}].textContent)"
    button = "document.querySelectorAll('table.classes th button')[{}].click()"
    for cell, ascending in ((3, ["0.333333", "0.666667", "0.833333"]), (1, ["3", "3", "6"]), (0, CLASSES)):
        driver.execute_script(button.format(cell))
        assert driver.execute_script(column.format(cell)) == ascending
        driver.execute_script(button.format(cell))
        assert driver.execute_script(column.format(cell)) == ascending[::-1]
    assert (
        driver.execute_script("return document.querySelector('table.classes th[aria-sort]').ariaSort") == "descending"
    )
    pdf = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")

"""What several test files share: the repository's root on sys.path, tiny data, and the scripts run as processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # no test cuts the power, and a run would wait twenty times for the disk

SMALL = [
    *("--device", "cpu", "--model", "test_resnet", "--workers", "0", "--batch-size", "8"),
    *("--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32"),
]
SMALL_POLICY = [*SMALL, "--policy-model", "test_resnet", "--grid", "8", "--kernel", "5", "--sigma", "2"]


class MakesAFolder:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_image_folder(root: Path, classes: tuple[str, ...] = ("bright", "dark", "striped"), images: int = 12) -> Path:
    """DATA/{train,val,test}/<class>/<number>.png: 40 x 36 grey pixels; half as many in val and test, plus one."""
    patterns = {
        "bright": lambda noise: 180 + noise,
        "dark": lambda noise: 60 + noise,
        "striped": lambda noise: 120 + noise + 60 * (np.arange(36) % 8 < 4),
    }
    for split_number, (split, count) in enumerate((("train", images), ("val", images // 2 + 1), ("test", 3))):
        for class_number, name in enumerate(classes):
            pattern = patterns.get(name, lambda noise, level=class_number: 30 * level + noise)
            for number in range(count):
                noise = np.random.default_rng([split_number, class_number, number]).normal(0, 20, (40, 36))
                write_image(root / split / name / f"{number}.png", pattern(noise).clip(0, 255))
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny set of three easy classes, 36 + 21 + 9 images."""
    return write_image_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(image_folder, tmp_path):
    """train(script, *flags, name=...): run a script's module on the tiny set; returns its output folder."""

    def train(script, *flags, name="run", data=image_folder) -> Path:
        base = SMALL if script.SCRIPT == "_normal" else SMALL_POLICY
        script.main([*base, "--data-path", str(data), "--output-dir", str(tmp_path / name), *map(str, flags)])
        return tmp_path / name

    return train


def run_script(
    script: str,
    *arguments: object,
    processes: int | None = None,
    cwd: Path = ROOT,
    check: bool = True,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository: by python, or by torchrun when `processes` is given; one thread in each."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [*launcher, script, *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture
def ended_in_time():
    """A test that waits for the other end of a pipe, say, is stopped, and fails."""

    def fail(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)

"""Several processes compute what one does: gradients, prior, predictions, metrics; and stop together."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT, run_script
from tests.helpers import worker
from tests.helpers.ranks import run_ranks
from utils.runtime import distributed
from utils.runtime.distributed import Launch, name_of_start, read_launch, resolve_device, slurm_rendezvous


def work(job, output, *rest, processes):
    run_ranks("tests/helpers/worker.py", job, output, *rest, processes=processes)
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """Gradients and prior of 2 ranks with 4 images each, by the number of the setting."""
    return work("gradients", tmp_path_factory.mktemp("gradients") / "two", processes=2)


@pytest.mark.parametrize("number", range(3))
def test_two_ranks_with_half_the_batch_have_the_gradients_of_one(number, of_two_ranks):
    objective, mask_policy = worker.SETTINGS[number]
    assert objective == "reinforce"
    expected = worker.gradients(objective, mask_policy)
    torch.testing.assert_close(of_two_ranks[str(number)], expected, rtol=1e-4, atol=1e-6)


def test_published_gradients_are_the_average_of_the_ranks_own(of_two_ranks, monkeypatch):
    """A product of two means over a rank's own batch: not the gradient of the global batch."""
    own = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [value])
    monkeypatch.setattr(distributed, "all_reduce_mean", lambda tensor: tensor.detach())
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own.append(worker.gradients("published", "learned"))
    expected = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
    torch.testing.assert_close(of_two_ranks["3"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_predictions_and_metrics_do_not_depend_on_the_number_of_processes(image_folder, tmp_path):
    worker.evaluation(tmp_path / "1", image_folder)
    one = torch.load(tmp_path / "1", weights_only=True)
    logits, targets, indices = one["predictions"]
    assert targets.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert indices.tolist() == list(range(21))
    for processes in (2, 3, 8):
        found = work("evaluation", tmp_path / str(processes), image_folder, processes=processes)
        torch.testing.assert_close(found["predictions"][0], logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found["predictions"][0].argmax(1), logits.argmax(1))
        assert torch.equal(found["predictions"][1], targets)
        assert torch.equal(found["predictions"][2], indices)
        assert found["metrics"] == pytest.approx(one["metrics"], abs=1e-6)


def test_what_one_rank_meets_all_ranks_agree_on(tmp_path):
    found = work("guard", tmp_path / "guard", processes=2)
    first, second, third = found["weights"]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert third.isfinite().all()
    assert found["means"] == {"rank": 0.5}
    assert found["state"]["totals"].tolist() == [[0.0], [3.0]]
    batch = [
        {"rank": 0, "loss_is_finite": True, "images": ["0_1.png"]},
        {"rank": 1, "loss_is_finite": False, "images": ["1_1.png"]},
    ]
    assert len(found["gathered"]) == 2
    for (message, reported), stops in found["gathered"]:
        assert "not finite at epoch 4, step 1" in message
        assert reported == batch
        assert stops == [False, False, True]  # the signal came to rank 1 alone, and both stop after the same step


@pytest.mark.parametrize("kind", ["agreed", "alone"])
def test_one_rank_that_fails_stops_all_with_one_sentence(kind, tmp_path):
    result = run_script("tests/helpers/worker.py", "failure", tmp_path / "none", kind, processes=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: only the last rank saw this") == 1
    own_output, _, report = result.stderr.partition("torch/distributed/elastic")  # which torchrun itself writes
    assert "Traceback" not in own_output
    assert report.count("traceback : only the last rank saw this") == 1


def test_a_start_has_a_name_of_its_own_though_the_store_remembers_others():
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [master] + [dist.TCPStore("127.0.0.1", master.port, is_master=False) for _ in range(2)]
    names = set()
    for _ in range(3):  # the second and the third find what the ones before have left
        with ThreadPoolExecutor() as pool:
            ranks = [pool.submit(name_of_start, clients[rank], rank, 3, 30) for rank in (1, 2)]
            time.sleep(0.2)
            assert not any(rank.done() for rank in ranks)
            first = name_of_start(master, 0, 3, 30)
            assert [rank.result() for rank in ranks] == [first, first]
        names.add(first)
    assert len(names) == 3
    with pytest.raises(dist.DistNetworkError, match=r"rank 0 gave no answer within 0\.2 s"):
        name_of_start(clients[1], 1, 3, 0.2)


def test_the_launcher_is_read_rightly():
    assert read_launch({}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_launch(torchrun) == Launch(3, 8, 1, 2)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    assert read_launch(batch_script) is None  # a plain python inside an sbatch
    step = {**batch_script, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_NODES": "2"}  # fmt: skip
    assert read_launch(step) == Launch(5, 8, 1, 4)
    assert read_launch({**step, "SLURM_GPUS_PER_TASK": "1"}) == Launch(5, 8, 0, 1)  # each task sees one GPU only
    assert read_launch({**step, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert read_launch({**step, **torchrun}) == Launch(3, 8, 1, 2)  # RANK wins


def test_slurm_rendezvous():
    assert slurm_rendezvous({"SLURM_JOB_ID": "12345"}) == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "22345"}
    two_nodes = {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    assert slurm_rendezvous(two_nodes) == {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "20001"}


def test_a_slurm_step_without_torchrun_finds_its_processes(tmp_path, image_folder):
    """Two processes with Slurm's variables only, as srun would start them."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/helpers/worker.py", "evaluation", str(tmp_path / "slurm"), str(image_folder)],
            cwd=ROOT,
            env={**os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(torch.load(tmp_path / "slurm", weights_only=True)["predictions"][1]) == 21


@pytest.mark.parametrize(
    ("name", "local_world_size", "expected"),
    [
        ("cuda", 1, "finds no CUDA device here; give --device cpu"),
        ("cuda:3", 1, "finds no CUDA device"),
        ("mps", 1, "only cuda and cpu"),
        ("gpu", 1, "not a device"),
    ],
)
def test_devices_that_are_not_there(name, local_world_size, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=expected):
        resolve_device(name, 0, local_world_size)


def test_devices_of_a_node_with_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(None, 1, 2) == resolve_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu", 1, 2) == torch.device("cpu")
    for name, local_world_size, expected in (
        ("cuda", 3, "has 2 GPUs"),
        ("cuda:2", 1, "has 2 GPUs"),
        ("cuda:1", 2, "each process needs its own GPU"),
    ):
        with pytest.raises(ValueError, match=expected):
            resolve_device(name, 0, local_world_size)

"""Several processes compute the same as one (gradients, prior, predictions, metrics) and stop together."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_script
from tests.helpers import worker
from tests.helpers.ranks import PATIENCE, run_ranks, start_process
from utils.runtime import distributed
from utils.runtime.distributed import name_of_start, resolve_device
from utils.runtime.errors import UserError
from utils.runtime.launch import Launch, read_launch, slurm_rendezvous

WORKER = "tests/helpers/worker.py"


def work(job, output, *rest, processes):
    """The result of a job of worker.py on several ranks."""
    run_ranks(WORKER, job, output, *rest, processes=processes)
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Gradients and prior on 2 ranks with 4 images each, by the number of the setting."""
    return work("gradients", tmp_path_factory.mktemp("gradients") / "two", processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_two_ranks_with_half_the_batch_have_the_gradients_of_one(number, two_ranks):
    objective, mask_policy = worker.SETTINGS[number]
    assert objective != "published"
    expected = worker.gradients(objective, mask_policy)
    torch.testing.assert_close(two_ranks[str(number)], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_published_gradients_are_the_average_over_ranks(two_ranks, monkeypatch):
    """The loss is a product of two means over a rank's own batch, so its gradient is not the global batch's."""
    by_rank = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [value])
    monkeypatch.setattr(distributed, "combine", lambda tensors: [tensor.detach() for tensor in tensors])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        by_rank.append(worker.gradients("published", "learned"))
    expected = {name: (by_rank[0][name] + by_rank[1][name]) / 2 for name in by_rank[0]}
    torch.testing.assert_close(two_ranks["4"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_predictions_and_metrics_do_not_depend_on_the_number_of_processes(image_folder, tmp_path):
    worker.evaluation(tmp_path / "1", image_folder)
    one = torch.load(tmp_path / "1", weights_only=True)
    logits, targets, indices = one["predictions"]
    assert targets.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert indices.tolist() == list(range(21))
    for processes in (3, 8):
        result = work("evaluation", tmp_path / str(processes), image_folder, processes=processes)
        found_logits, found_targets, found_indices = result["predictions"]
        torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found_logits.argmax(1), logits.argmax(1))
        assert torch.equal(found_targets, targets)
        assert torch.equal(found_indices, indices)
        assert result["metrics"] == pytest.approx(one["metrics"], abs=1e-6)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_or_a_signal_on_one_rank_affects_all(tmp_path):
    result = work("guard", tmp_path / "guard", processes=2)
    first, second, third = result["weights"]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert third.isfinite().all()
    assert result["means"] == {"rank": 0.5}
    assert result["state"]["totals"].tolist() == [[0.0], [3.0]]
    batch = [
        {"rank": 0, "loss_is_finite": True, "images": ["0_1.png"]},
        {"rank": 1, "loss_is_finite": False, "images": ["1_1.png"]},
    ]
    assert len(result["gathered"]) == 2
    for (message, reported), stops in result["gathered"]:
        assert "not finite at epoch 4, step 1" in message
        assert reported == batch
        assert stops == [False, False, True]  # the signal came to rank 1 alone, and both stop after the same step


@pytest.mark.slow
def test_a_step_of_three_ranks_has_one_collective_besides_the_gradients(image_folder, tmp_path):
    result = work("collectives", tmp_path / "result", image_folder, processes=3)
    assert result["combined"] == [2.0, [[1.0, 2.0]], True, False, pytest.approx(5e-9 / 3, rel=1e-9)]
    assert result["dtypes"] == ["torch.float32", "torch.float32", "torch.bool", "torch.bool", "torch.float64"]
    rehearsal, *steps, last = result["steps"]
    assert steps == [["all_reduce"]] * 5
    assert rehearsal == last == ["all_reduce"] * 2  # the second is of a progress line


TORCHRUN = pytest.param("agreed", run_script, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "run"), [TORCHRUN, ("agreed", run_ranks), ("alone", run_ranks)])
def test_one_rank_that_fails_stops_all_with_one_sentence(kind, run, tmp_path):
    result = run(WORKER, "failure", tmp_path / "none", kind, processes=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: only the last rank saw this") == 1
    own_output, _, report = result.stderr.partition("torch/distributed/elastic")  # which torchrun itself writes
    assert "Traceback" not in own_output
    assert report.count("traceback : only the last rank saw this") == (run is run_script)


@pytest.mark.slow
def test_each_start_has_a_new_name_though_the_store_is_reused():
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [master] + [dist.TCPStore("127.0.0.1", master.port, is_master=False) for _ in range(2)]
    names = set()
    for _ in range(3):  # the second and the third find what the previous ones left
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


def test_ranks_are_read_from_the_variables_of_torchrun_and_slurm():
    assert read_launch({}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_launch(torchrun) == Launch(3, 8, 1, 2)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    assert read_launch(batch_script) is None  # a plain python inside an sbatch
    step = {**batch_script, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_NODES": "2"}  # fmt: skip
    assert read_launch(step) == Launch(5, 8, 1, 4)
    for gpus in ("1", "a100:1"):  # each task sees one GPU only
        assert read_launch({**step, "SLURM_GPUS_PER_TASK": gpus}) == Launch(5, 8, 0, 1)
    assert read_launch({**step, "SLURM_GPUS_PER_TASK": "a100:11"}) == Launch(5, 8, 1, 4)
    assert read_launch({**step, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert read_launch({**step, **torchrun}) == Launch(3, 8, 1, 2)  # RANK wins


def test_ranks_of_slurm_meet_on_the_first_node():
    assert slurm_rendezvous({"SLURM_JOB_ID": "12345"}) == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "22345"}
    two_nodes = {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "2"}
    for nodes, first in (("gpu[03-05,9],login1", "gpu03"), ("a-1,a-2", "a-1"), ("r[1-2]n[07,9].lan", "r1n07.lan")):
        address = slurm_rendezvous({**two_nodes, "SLURM_STEP_NODELIST": nodes})
        assert address == {"MASTER_ADDR": first, "MASTER_PORT": "20001"}


@pytest.mark.slow
def test_a_slurm_step_without_torchrun_finds_its_processes(tmp_path, image_folder):
    """Two processes with Slurm's variables only, as srun would start them."""
    step = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NUM_NODES": 1, "SLURM_JOB_ID": os.getpid()}
    (tmp_path / "output").touch()
    words, outputs = ["evaluation", str(tmp_path / "slurm"), str(image_folder)], [tmp_path / "output"] * 2
    processes = [
        start_process(WORKER, words, *outputs, {**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in (0, 1)
    ]
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "output").read_text()
    assert len(torch.load(tmp_path / "slurm", weights_only=True)["predictions"][1]) == 21


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cuda:3", "finds no CUDA device here; give --device cpu"), ("mps", "only cuda and cpu"), ("gpu", "not a device")],
)
def test_missing_devices_are_refused_with_advice(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=expected):
        resolve_device(name)


@pytest.mark.slow
def test_the_first_process_of_each_node_names_what_its_node_lacks(tmp_path):
    """Rank 8, the first process of the second node: rank 0 prints on another machine."""
    place = {"RANK": 8, "WORLD_SIZE": 16, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 8, "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--data-path", str(tmp_path), "--output-dir", str(tmp_path / "run"), "--device", "cuda"]
    process = start_process("_normal/train.py", flags, tmp_path / "out", tmp_path / "out", place)
    process.join(PATIENCE)
    assert process.exitcode == 2
    assert "--device cuda: PyTorch finds no CUDA device here; give --device cpu." in (tmp_path / "out").read_text()


def test_each_process_of_a_node_gets_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(None, 1, 2) == resolve_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu", 1, 2) == torch.device("cpu")
    for name, processes, expected in (("cuda", 3, "has 2 GPUs"), ("cuda:2", 1, "has 2 GPUs"), ("cuda:1", 2, "own GPU")):
        with pytest.raises(UserError, match=expected):
            resolve_device(name, 0, processes)

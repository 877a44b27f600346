"""ONNX files: checked against torch for any batch size; missing packages are reported first."""

import importlib.util
import re

import pytest
import torch

from tests.helpers.exports import logits_of, random_model, run_export, write_checkpoint
from utils import export
from utils.inference import onnx as onnx_file
from utils.runtime.errors import UserError


def test_missing_packages_are_reported_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--onnx: needs onnx and onnxscript: pip install onnx onnxscript"):
        export.main([str(tmp_path / "absent.pth"), "--onnx"])


@pytest.mark.slow
def test_onnx_gives_torchs_logits_for_any_batch_size(tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="one of the packages of the extra onnx is missing")
    import onnxruntime

    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    source = write_checkpoint(tmp_path / "model_0.pth")
    folder = run_export(source, tmp_path / "out", "--onnx")
    assert re.search(r"RIN.onnx: its logits equal torch's within \S+ of the largest", capsys.readouterr().out)
    path = folder / f"{folder.name}.onnx"
    assert path.name in (folder / "SHA256SUMS").read_text()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (logits,) = session.run(["logits"], {"images": images[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), logits_of(source, images[:batch]), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="the exported logits differ from torch's by"):
        onnx_file.check(random_model(seed=9), 32, path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert onnx_file.check(random_model(), 32, path).endswith("not checked, because onnxruntime is not installed")

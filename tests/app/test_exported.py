"""`distbelief export`: each form read back by its own reader, held against our forward."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from distbelief.cli import cli
from distbelief.exported import export_run
from distbelief.factory import make_model, open_data
from distbelief.job import load_job
from distbelief.loaded import load_run
from distbelief.model_file import save_model
from distbelief.problem import Problem

CLOSE = 1e-5


@pytest.fixture(scope="module", params=["googlenet-small", "googlenet"])
def run(request, tmp_path_factory):
    """The folder of a run on digits whose model has its first parameters."""
    path = tmp_path_factory.mktemp("run")
    # OpenCV makes nothing of a 3x3 pool on 2x2 pixels, which 16 would come to; Caffe one pixel.
    size = {"googlenet": 64, "googlenet-small": 32}[request.param]
    said = {"model.factory": request.param, "model.width": 0.25, "data.image_size": size}
    job = load_job(None, said, ())
    model = make_model(job, open_data(job, "train"))
    (path / "config.toml").write_text(job.to_toml())
    save_model(model, path / "model.safetensors")
    return path


@pytest.fixture
def images(run):
    shape = load_run(run, "train").input_shape
    assert shape is not None
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(2))


def difference(run: Path, images: torch.Tensor, theirs: np.ndarray) -> float:
    with torch.no_grad():
        ours = load_run(run, "train").model.eval()(images).numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


ASK = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
assert "RGB" in session.get_modelmeta().custom_metadata_map["pixels"]
images = numpy.load(sys.argv[2])
out = [session.run(["scores"], {"images": images[:n]})[0] for n in (len(images), 1)]
numpy.savez(sys.argv[3], *out)
"""


def test_onnx_agrees_in_onnxruntime(run, images, tmp_path):
    """Each in a process of its own: both leave threads or files open."""
    if find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    path = tmp_path / "net.onnx"
    command = [sys.executable, "-m", "distbelief", "export", run, "-o", path, "--json"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert (told["files"], told["num_classes"]) == ([str(path)], 10)
    np.save(tmp_path / "images.npy", images.numpy())
    given = [path, tmp_path / "images.npy", tmp_path / "scores.npz"]
    subprocess.run([sys.executable, "-c", ASK, *given], check=True)
    with np.load(tmp_path / "scores.npz") as scores:
        for theirs in scores.values():  # of all images, and of one
            assert difference(run, images[: len(theirs)], theirs) <= CLOSE


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")  # others still load it
def test_torchscript_and_torch_export_agree(run, images, tmp_path):
    export_run(run, "torchscript", tmp_path / "net.ts")
    export_run(run, "torch-export", tmp_path / "net.pt2")
    with torch.no_grad():
        for net in (
            torch.jit.load(tmp_path / "net.ts"),
            torch.export.load(tmp_path / "net.pt2").module(),
        ):
            for count in (5, 1):
                theirs = net(images[:count]).numpy()
                assert difference(run, images[:count], theirs) <= CLOSE


def test_caffes_files_agree_in_opencv(run, images, tmp_path):
    cv2 = pytest.importorskip("cv2")
    made = export_run(run, "caffe", tmp_path / "net.caffemodel")
    text, weights = made.files
    net = cv2.dnn.readNetFromCaffe(str(text), str(weights))
    net.setInput(images[:1].numpy())
    assert difference(run, images[:1], net.forward("loss3/classifier")) <= CLOSE


def test_safetensors_have_the_state_dict(run, tmp_path):
    export_run(run, "safetensors", tmp_path / "net.safetensors")
    state = load_run(run, "train").model.state_dict()
    found = load_file(tmp_path / "net.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_command_writes_beside_the_runs_model_and_says_what_it_takes(run):
    answer = CliRunner().invoke(cli, ["export", str(run), "--to", "torchscript"])
    assert answer.exit_code == 0, answer.output
    assert (run / "model.ts").is_file()
    assert "takes [batch, 1, " in answer.output
    told = json.loads(
        CliRunner().invoke(cli, ["export", str(run), "--to", "safetensors", "--json"]).stdout
    )
    assert (told["type"], told["num_classes"]) == ("export", 10)


NETS = """
from torch import nn

class Branching(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(256, num_classes)

    def forward(self, x):
        if float(x.sum()) > 1e9:  # depends on the values: nothing that could be exported
            return self.layer(x.flatten(1)) * 2
        return self.layer(x.flatten(1))
"""


def test_a_model_that_cannot_be_exported_is_told(tmp_path, monkeypatch):
    (tmp_path / "branching_net.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    job = load_job(None, {"model.factory": "branching_net:Branching"}, ())
    (tmp_path / "config.toml").write_text(job.to_toml())
    save_model(make_model(job, open_data(job, "train")), tmp_path / "model.safetensors")
    out = tmp_path / "net.pt2"
    out.write_text("as it was")
    for form in ("torch-export", "caffe"):
        with pytest.raises(Problem) as error:
            export_run(tmp_path, form, out)
        assert error.value.code == "DB-MODEL-008"
    assert out.read_text() == "as it was"
    with pytest.raises(Problem) as error:
        export_run(tmp_path, "safetensors", tmp_path / "nowhere" / "net.safetensors")
    assert error.value.code == "DB-STORE-004"

"""`distbelief import`: Caffe's GoogLeNet as a run folder, and what is refused."""

import json
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from distbelief.cli import cli
from distbelief.imported import CAFFE_MEAN, for_our_pixels, import_model
from distbelief.loaded import load_run
from distbelief.model.caffemodel import write_caffemodel
from distbelief.model.googlenet import GoogLeNet, load_caffe
from distbelief.problem import Problem
from distbelief.workers.pixels import MEAN, normalise

WIDTH = 0.125
CLASSES = 7


def weights(*, aux):
    random = np.random.default_rng(5)
    net = GoogLeNet(CLASSES, width=WIDTH, aux=aux)
    return {
        name: [
            (random.standard_normal(layer.weight.shape) / layer.weight[0].numel() ** 0.5),
            random.standard_normal(layer.bias.shape) * 0.1,
        ]
        for name, layer in net.caffe_layers().items()
        if layer.bias is not None
    }


@pytest.fixture
def caffemodel(tmp_path):
    def write(blobs, name="bvlc.caffemodel"):
        path = tmp_path / name
        path.write_bytes(write_caffemodel("n", [(key, "", own) for key, own in blobs.items()]))
        return path

    return write


@pytest.mark.parametrize("aux", [True, False])
def test_a_caffemodel_becomes_a_run_that_gives_what_caffe_gives(caffemodel, tmp_path, aux):
    blobs = weights(aux=aux)
    seen = []
    made = import_model(
        caffemodel(blobs), tmp_path / "run", "folder:x", lambda *told: seen.append(told)
    )
    assert (made.num_classes, made.width, made.num_layers) == (CLASSES, WIDTH, len(blobs))
    assert seen[-1] == (len(blobs), len(blobs))
    loaded = load_run(tmp_path / "run", "test")
    assert loaded.input_shape == (3, 224, 224)
    assert isinstance(loaded.model, GoogLeNet)
    assert loaded.model.has_aux is aux

    caffe = GoogLeNet(CLASSES, width=WIDTH, aux=aux).eval()
    load_caffe(caffe, blobs)
    random = np.random.default_rng(6)
    rgb = torch.from_numpy(random.integers(0, 256, (2, 3, 224, 224), np.uint8))
    theirs = (rgb.float() - torch.tensor(CAFFE_MEAN).view(3, 1, 1)).flip(1)  # BGR
    with torch.no_grad():
        expected, found = caffe(theirs), loaded.model.eval()(normalise(rgb))
    # Caffe pads with its mean, we with ours, which differ by 0.7 of 255.
    assert float((expected - found).abs().max() / expected.abs().max()) < 2e-3


def test_the_first_convolution_is_the_same_inside_the_image():
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 3, 7, 7, generator=random)
    bias = torch.randn(8, generator=random)
    rgb = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=random)
    bgr = (rgb.float() - torch.tensor(CAFFE_MEAN).view(3, 1, 1)).flip(1)
    expected = torch.conv2d(bgr, weight, bias)
    found = torch.conv2d(normalise(rgb), *for_our_pixels(weight.numpy(), bias.numpy()))
    assert float((expected - found).abs().max() / expected.abs().max()) < 1e-6
    assert max(abs(255 * a - b) for a, b in zip(MEAN, CAFFE_MEAN, strict=True)) < 0.73


def test_the_command_says_what_it_has_made(caffemodel, tmp_path):
    out = tmp_path / "runs" / "theirs"
    call = ["import", str(caffemodel(weights(aux=True))), "-o", str(out)]
    answer = CliRunner().invoke(cli, [*call, "--json"])
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    assert told["type"] == "import"
    assert (told["folder"], told["num_classes"]) == (str(out), CLASSES)
    again = CliRunner().invoke(cli, call)  # the folder is there
    assert again.exit_code == 5
    assert "DB-STORE-002" in again.output


def refused(path, tmp_path):
    with pytest.raises(Problem) as error:
        import_model(path, tmp_path / "run", "digits")
    assert not (tmp_path / "run").exists()
    assert error.value.code == "DB-MODEL-007"
    return error.value


def test_torchvisions_network_is_refused_with_the_reason(tmp_path):
    tensors = {"inception3a.branch1.conv.weight": torch.zeros(2), "fc.bias": torch.zeros(1)}
    save_file(tensors, tmp_path / "googlenet.safetensors")
    torch.save(tensors, tmp_path / "googlenet.pth")
    for name in ("googlenet.safetensors", "googlenet.pth"):
        problem = refused(tmp_path / name, tmp_path)
        assert "another network" in problem.what
        assert "3x3 where the paper has 5x5" in problem.why


def test_a_pickle_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as file:
        file.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    assert "run any program" in refused(tmp_path / "other.pth", tmp_path).what


@pytest.mark.parametrize("mistake", ["missing", "shape", "extra", "classes"])
def test_another_network_is_refused(caffemodel, tmp_path, mistake):
    blobs = weights(aux=False)
    if mistake == "missing":
        del blobs["inception_4b/3x3"]
    elif mistake == "shape":
        blobs["inception_4b/3x3"][0] = np.zeros((1, 2, 3, 3))
    elif mistake == "extra":
        blobs["fc8"] = [np.zeros((2, 2)), np.zeros(2)]
    else:
        del blobs["loss3/classifier"]
    assert "no GoogLeNet" in refused(caffemodel(blobs), tmp_path).what


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    assert "not a caffemodel" in refused(tmp_path / "a.txt", tmp_path).what
    assert "cannot be read" in refused(tmp_path / "none", tmp_path).what
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**30 + 1)
    assert "bytes, more than" in refused(tmp_path / "huge", tmp_path).what

"""The network as OpenCV's Caffe importer reads it, held against our own forward."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distbelief.model.caffemodel import write_caffemodel
from distbelief.model.googlenet import GoogLeNet
from distbelief.model.prototxt import layers_of, prototxt

NETS: dict[str, dict[str, Any]] = {
    "the paper's": {"image_size": 224},
    "small, with batch norm": {
        "stem": "small",
        "norm": "batch",
        "image_size": 32,
        "width": 0.5,
        "aux": False,
    },
    "naive": {"inception": "naive", "image_size": 64, "width": 0.25},
    "separable": {"conv1": "separable", "image_size": 64, "width": 0.25},
}


@pytest.mark.parametrize("name", NETS, ids=[name.replace(" ", "-") for name in NETS])
def test_opencv_agrees_with_our_forward_to_1e_5(name: str, tmp_path: Path):
    cv2 = pytest.importorskip("cv2")
    settings = NETS[name]
    torch.manual_seed(3)
    net = GoogLeNet(1000 if settings["image_size"] == 224 else 10, init="xavier", **settings)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training, not as at the beginning
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    net.eval()
    layers = layers_of(net)
    size = settings["image_size"]
    (tmp_path / "net.prototxt").write_text(prototxt("a net", layers, 3, size))
    (tmp_path / "net.caffemodel").write_bytes(
        write_caffemodel("a net", [(one.name, one.kind, one.arrays) for one in layers])
    )
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        ours = net(image).numpy()
    theirs_net = cv2.dnn.readNetFromCaffe(
        str(tmp_path / "net.prototxt"), str(tmp_path / "net.caffemodel")
    )
    theirs_net.setInput(image.numpy())
    theirs = theirs_net.forward("loss3/classifier")
    assert float(np.abs(ours - theirs).max() / np.abs(theirs).max()) <= 1e-5
    theirs_net.setInput(image.numpy())
    probabilities = theirs_net.forward("prob")
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-4)

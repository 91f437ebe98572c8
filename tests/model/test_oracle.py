"""Activations and weights held against two independent engines that run Caffe's own network.

The reference numbers are no part of the repository: they lie in $DISTBELIEF_TEST_DATA/oracle, or
in ../shared/data/oracle beside the repository. Where neither is there, these tests skip.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distbelief.model.caffemodel import read_caffemodel, write_caffemodel
from distbelief.model.googlenet import GoogLeNet, load_caffe

logger = logging.getLogger(__name__)

# Layers of the network by the names of Caffe's blobs, where the two differ.
BLOBS = {
    "pool2/3x3_s2": "pool2",
    "pool5/7x7_s1": "pool5",
    "loss1/ave_pool": "loss1.pool",
    "loss1/classifier": "loss1",
    "loss2/classifier": "loss2",
    "loss3/classifier": "loss3",
}
NEARER_ENGINE = 1e-5
EVERY_ENGINE = 2e-5


@pytest.fixture(scope="module")
def oracle() -> Path:
    given = os.environ.get("DISTBELIEF_TEST_DATA")
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = (Path(given) if given else beside) / "oracle"
    if not (folder / "googlenet_reference.npz").is_file():
        pytest.skip(f"no GoogLeNet reference in {folder}: set DISTBELIEF_TEST_DATA to its parent")
    return folder


def reference_weights(oracle: Path) -> dict[str, list[Any]]:
    """The weights behind the reference, drawn as its README says: {layer: [weight, bias]}."""
    shapes = json.loads((oracle / "googlenet_parameters.json").read_text())
    blobs: dict[str, list[Any]] = {}
    rng = np.random.RandomState(20141)
    for key in sorted(shapes):  # ..._b_0 comes before ..._w_0
        layer, kind = key[: -len("_w_0")], key[-len("w_0")]
        values = rng.randn(*shapes[key])
        scale = np.sqrt(2 / np.prod(shapes[key][1:])) if kind == "w" else 0.1
        blobs.setdefault(layer, [None, None])["wb".index(kind)] = (values * scale).astype("f4")
    rng = np.random.RandomState(20142)
    for head, channels in (("loss1", 512), ("loss2", 528)):
        for part, shape in (
            ("conv", (128, channels, 1, 1)),
            ("fc", (1024, 2048)),
            ("classifier", (1000, 1024)),
        ):
            weight = rng.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
            bias = rng.randn(shape[0]) * 0.1
            blobs[f"{head}/{part}"] = [weight.astype("f4"), bias.astype("f4")]
    return blobs


@pytest.fixture(scope="module")
def errors(oracle: Path) -> dict[str, dict[str, float]]:
    """max|ours - theirs| / max|theirs| by blob and engine, for every blob of the reference."""
    with np.load(oracle / "googlenet_reference.npz") as file:
        reference = dict(file)
    image = torch.from_numpy(reference.pop("x"))
    net = GoogLeNet().eval()
    weights = [(name, "", arrays) for name, arrays in reference_weights(oracle).items()]
    load_caffe(net, read_caffemodel(write_caffemodel("GoogLeNet", weights)))
    ours: dict[str, Any] = {}
    engines: dict[str, dict[str, Any]] = {}
    for key, theirs in reference.items():
        engine, blob = key.split("|", 1)
        engines.setdefault(blob.replace("|", "/"), {})[engine] = theirs
    for blob in engines:
        module = net.get_submodule(BLOBS.get(blob, blob.removesuffix("/output")))
        module.register_forward_hook(lambda _, __, y, blob=blob: ours.update({blob: y.numpy()}))
    with torch.no_grad():
        net(image, aux=True)
    assert ours.keys() == engines.keys()
    return {
        blob: {
            engine: float(np.abs(ours[blob] - theirs).max() / np.abs(theirs).max())
            for engine, theirs in by_engine.items()
        }
        for blob, by_engine in engines.items()
    }


def test_the_reference_covers_the_main_path_and_both_heads(errors: dict[str, dict[str, float]]):
    assert sum(map(len, errors.values())) == 15
    assert {"loss1/ave_pool", "loss1/classifier", "loss2/classifier", "pool2/3x3_s2"} <= set(errors)
    assert set(errors["loss3/classifier"]) == {"ort", "cv2"}


def test_every_blob_agrees_with_its_nearer_engine_to_1e_5(errors: dict[str, dict[str, float]]):
    nearest = {blob: min(by_engine.values()) for blob, by_engine in errors.items()}
    assert {blob: error for blob, error in nearest.items() if not error <= NEARER_ENGINE} == {}


def test_every_blob_agrees_with_every_engine_to_2e_5(errors: dict[str, dict[str, float]]):
    farthest = {blob: max(by_engine.values()) for blob, by_engine in errors.items()}
    logger.info("worst of %d blobs: %.1e", len(farthest), max(farthest.values()))
    assert {blob: error for blob, error in farthest.items() if not error <= EVERY_ENGINE} == {}

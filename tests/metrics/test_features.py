"""Feature networks: any function, the classifier of digits, DINOv2 as in EDM2; cached features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamamba.data.digits import Digits
from lamamba.evaluation.extraction import extract
from lamamba.evaluation.images import DigitImages, GeneratedImages
from lamamba.metrics import Statistics, frechet_distance
from lamamba.metrics.digits import HELD_OUT
from lamamba.metrics.digits_network import DigitFeatures, train
from lamamba.metrics.dinov2 import DinoFeatures
from lamamba.metrics.features import CallableFeatures


@pytest.fixture(scope="module")
def digits():
    return Digits()


def distance(network, one, two):
    sides = [Statistics(64).add(network(side)["features"]) for side in (one, two)]
    return frechet_distance(*(value for side in sides for value in (side.mean, side.covariance())))


def test_the_classifier_is_accurate_on_held_out_digits(digits):
    held_out = np.random.default_rng(0).permutation(len(digits))[:HELD_OUT]
    logits = DigitFeatures()(digits.images[held_out].transpose(0, 2, 3, 1))["logits"]
    assert (logits.argmax(axis=1) == digits.labels[held_out]).mean() > 0.98


def test_the_distance_of_digits_grows_with_damage(digits):
    network, images = DigitFeatures(), digits.images.transpose(0, 2, 3, 1)
    one, two = images[::2], images[1::2]
    draws = np.random.default_rng(0)
    noisy = [np.clip(two + draws.normal(size=two.shape) * sigma, 0, 255).astype(np.uint8) for sigma in (0, 20, 60)]
    distances = [distance(network, one, side) for side in noisy]
    assert distances == sorted(distances)
    assert distances[2] > 5 * distances[0]
    few = digits.labels[1::2] < 5                                               # half of the classes are missing
    assert distance(network, one, two[few]) > 5 * distances[0]


def test_enlarged_digits_have_the_same_features(digits):
    network = DigitFeatures()
    small, large = digits.images[:20].transpose(0, 2, 3, 1), Digits(16).images[:20].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(network(large)["features"], network(small)["features"], atol=1e-5)
    with pytest.raises(ValueError, match="a multiple of 8, not 12 x 12 pixels with 1 channels"):
        network(np.zeros((1, 12, 12, 1), dtype=np.uint8))


def test_training_the_classifier_learns():
    assert train(epochs=6)[1] > 0.9


def test_any_function_is_a_feature_network():
    network = CallableFeatures(lambda images: images.reshape(len(images), -1)[:, :2], "corner", channels=1)
    assert network(np.full((3, 4, 4, 1), 7, dtype=np.uint8))["features"].tolist() == [[7, 7]] * 3
    assert network.info.name == "corner"
    with pytest.raises(ValueError, match=r"odd made {'features': \(4,\)} of 4 images"):
        CallableFeatures(lambda images: np.zeros(len(images)), "odd")(np.zeros((4, 2, 2, 3), dtype=np.uint8))
    with pytest.raises(RuntimeError, match="features odd failed: TypeError: 'int' object is not iterable"):
        CallableFeatures(lambda images: list(3), "odd")(np.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"odd made .*'logits': \(4,\)} of 4 images"):
        CallableFeatures(lambda images: {"features": np.zeros((4, 1)), "logits": np.zeros(4)}, "odd")(np.zeros((4, 1)))


def test_shards_are_made_once_and_damaged_ones_again(tmp_path):
    seen = []

    def function(images):
        seen.append(len(images))
        return images.reshape(len(images), -1)[:, :9]

    network = CallableFeatures(function, "nine", channels=1)
    images = DigitImages(limit=50)
    features = extract(images, network, tmp_path, shard_size=20, batch_size=8)
    assert seen == [8, 8, 4, 8, 8, 4, 8, 2]
    expected = images.read(range(50)).reshape(50, -1)[:, :9]
    np.testing.assert_array_equal(features.rows(), expected)
    np.testing.assert_array_equal(features.rows(limit=5), expected[[0, 10, 20, 30, 40]])
    np.testing.assert_array_equal(features.rows("asked"), images.classes(range(50)))
    np.testing.assert_allclose(features.statistics().covariance(), np.cov(expected.T))
    features.path(1).write_bytes(features.path(1).read_bytes()[:-5])
    seen.clear()
    reports = []
    again = extract(images, network, tmp_path, shard_size=20, batch_size=8, report=reports.append)
    assert seen == [8, 8, 4]
    counts = [(p.done, p.resumed) for p in reports if p.task == "features"]
    assert counts[0] == (30, 30)
    assert counts[-1] == (50, 30)
    np.testing.assert_array_equal(again.rows(), expected)
    assert extract(images, CallableFeatures(function, "other", channels=1), tmp_path).folder != features.folder


def test_kept_features_are_verified_by_their_hashes(tmp_path, caplog):
    network = CallableFeatures(lambda images: images.reshape(len(images), -1)[:, :9], "nine", channels=1)
    features = extract(DigitImages(limit=50), network, tmp_path, shard_size=20)
    expected, content = features.rows(), bytearray(features.path(2).read_bytes())
    for k in range(40):
        content[-k - 1] ^= 0x40
    features.path(2).write_bytes(content)
    with pytest.raises(ValueError, match="shard_00002.safetensors is not what was written"):
        features.rows()
    again = extract(DigitImages(limit=50), network, tmp_path, shard_size=20)
    np.testing.assert_array_equal(again.rows(), expected)
    assert "shard_00002.safetensors is not what was written: made anew, 1 of 3 shards" in caplog.text
    (features.folder / "shards.json").unlink()                                  # as before there were hashes
    features.path(2).write_bytes(content)
    np.testing.assert_array_equal(extract(DigitImages(limit=50), network, tmp_path, shard_size=20).rows(), expected)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Extraction and statistics of ten times as many images take the same: a shard and a matrix."""
    import tracemalloc

    class Many:
        shape = (4, 4, 3)

        def __init__(self, count):
            self.count, self.metadata = count, {"kind": "made up", "fingerprint": str(count)}

        def __len__(self):
            return self.count

        def read(self, indices):
            return np.random.default_rng(indices.start).integers(0, 256, (len(indices), 4, 4, 3), dtype=np.uint8)

        def classes(self, indices):
            return None

    network = CallableFeatures(lambda images: images.reshape(len(images), -1), "pixels")
    peaks = []
    for count in (500, 2_000, 20_000):                                          # the first one warms up
        tracemalloc.start()
        extract(Many(count), network, tmp_path, shard_size=500, batch_size=100).statistics()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]
    assert peaks[2] < 20_000 * 48 * 4 / 2                                       # half of the features as a matrix


def test_samples_are_made_when_they_are_read():
    def make(seeds, labels):
        return np.stack([np.full((1, 1, 1), 10 * label + seed) for seed, label in zip(seeds, labels, strict=True)])

    images = GeneratedImages(make, range(3, 9), [5, 4, 3, 2, 1, 0], metadata={"name": "toy"}, shape=(1, 1, 1))
    assert len(images) == 6
    assert images.read(range(1, 4)).ravel().tolist() == [44, 35, 26]
    assert images.classes(range(1, 4)).tolist() == [4, 3, 2]
    assert images.metadata["seeds"] == [3, 8]
    other = GeneratedImages(make, range(3, 9), [5, 4, 3, 2, 1, 1], metadata={"name": "toy"}, shape=(1, 1, 1))
    assert images.metadata["fingerprint"] != other.metadata["fingerprint"]


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(folder)
    return folder, model


def test_dinov2_gives_the_class_token_after_the_norm(dino):
    folder, _ = dino
    network = DinoFeatures(folder)
    seen = {}
    network._model.register_forward_hook(lambda m, args, kwargs, out: seen.update(kwargs, out=out), with_kwargs=True)
    image = np.broadcast_to(np.array([10, 100, 250], dtype=np.uint8), (2, 40, 30, 3))
    features = network(image)["features"]
    assert seen["pixel_values"].shape == (2, 3, 224, 224)
    expected = [(v / 255 - m) / s for v, m, s in zip((10, 100, 250), network.MEAN, network.STD, strict=True)]
    np.testing.assert_allclose(seen["pixel_values"].mean(dim=(0, 2, 3)), expected, rtol=1e-4)
    token = seen["out"].last_hidden_state[:, 0]                                 # already after the norm
    np.testing.assert_allclose(features, token.numpy())
    normed = token - network._model.layernorm.bias
    torch.testing.assert_close(normed.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)
    assert network.info.name == "dinov2-32-2"


def test_dinov2_positions_are_stretched_by_a_tenth_of_a_token(dino):
    folder, model = dino
    table = model.embeddings.position_embeddings.detach()[0]
    fitted = DinoFeatures(folder)._model.embeddings.position_embeddings[0]
    assert fitted.shape == (1 + 16 * 16, 32)
    torch.testing.assert_close(fitted[0], table[0])
    old = table[1:].reshape(37, 37, 32).double()

    def weight(x, a=-0.75):                                                     # Keys' cubic kernel, as PyTorch has it
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0

    for row, column in [(0, 0), (3, 9), (15, 15)]:
        y, x = ((k + 0.5) * 37 / 16.1 - 0.5 for k in (row, column))
        value = sum(
            weight(y - v) * weight(x - u) * old[min(max(v, 0), 36), min(max(u, 0), 36)]
            for v in range(int(y) - 3, int(y) + 5) for u in range(int(x) - 3, int(x) + 5)
        )
        torch.testing.assert_close(fitted[1 + row * 16 + column].double(), value, atol=1e-5, rtol=1e-5)


def test_dinov2_without_transformers_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="lamamba-diff\\[dinov2\\]"):
        DinoFeatures()

"""The Inception network of 2015: size, resize, outputs equal to torch-fidelity's, weight files."""

from __future__ import annotations

import hashlib
import math
import pickle

import numpy as np
import pytest
import torch

from lamamba.metrics.inception import Inception, load_inception, resize_like_tensorflow1
from tests.files import Bomb
from tests.metrics.peers import peer, random_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as the public one, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "some name.pth"
    torch.save(random_inception(), path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 40, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def model(weights):
    return load_inception(weights)[0]


def test_parameters():
    model = Inception()
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.fc.parameters()) == 21_785_568
    assert sum(p.numel() for p in model.parameters()) == 21_785_568 + 1008 * 2049                # 23.9 M
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 94


def test_resize_equals_a_loop_over_pixels():
    image = np.random.default_rng(0).uniform(0, 255, (5, 9)).astype(np.float32)
    for height, width in [(17, 4), (5, 9), (3, 20)]:
        expected = np.zeros((height, width))
        for row in range(height):
            for column in range(width):
                y, x = row * 5 / height, column * 9 / width
                top, left = int(y), int(x)
                bottom, right = min(top + 1, 4), min(left + 1, 8)
                upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
                lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
                expected[row, column] = upper * (1 - (y - top)) + lower * (y - top)
        resized = resize_like_tensorflow1(torch.from_numpy(image)[None, None], height, width)[0, 0]
        np.testing.assert_allclose(resized.numpy(), expected, atol=2e-3 if height == 3 else 1e-3)


def test_resize_of_torch_fidelity(images, monkeypatch):
    theirs = peer("torch_fidelity", "interpolate_compat_tensorflow", monkeypatch)
    expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    assert torch.equal(resize_like_tensorflow1(images.float(), 299, 299), expected)


def test_outputs_of_torch_fidelity(weights, model, images, monkeypatch):
    theirs = peer("torch_fidelity", "feature_extractor_inceptionv3", monkeypatch)
    network = theirs.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    seen = {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.update(spatial=output))
    with torch.no_grad():
        features, logits = network(images)
        ours = model(images)
    assert features.std() > 0.1                                                 # alive
    torch.testing.assert_close(ours["features"], features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["logits"], logits, rtol=1e-4, atol=1e-4)
    spatial = seen["spatial"]
    for row, column, channel in [(0, 0, 0), (0, 0, 6), (3, 16, 2), (16, 16, 6)]:
        place = (row * 17 + column) * 7 + channel                               # NHWC
        torch.testing.assert_close(ours["spatial"][:, place], spatial[:, channel, row, column])


def test_outputs_are_those_of_the_named_layers(model, images):
    seen = {}
    handles = [
        model.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.update(spatial=o)),
        model.Mixed_7c.register_forward_hook(lambda m, i, o: seen.update(last=o)),
        model.Conv2d_1a_3x3.conv.register_forward_hook(lambda m, i, o: seen.update(first=i[0])),
    ]
    with torch.no_grad():
        outputs = model(images)
        for handle in handles:
            handle.remove()
        alone = model(images[1:])
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "features": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
    assert seen["first"].shape == (2, 3, 299, 299)
    assert seen["first"].abs().max() <= 1
    assert (outputs["spatial"] >= 0).all()                                      # after ReLU
    expected = np.stack([seen["spatial"][:, :7].numpy()[:, c] for c in range(7)], axis=-1).reshape(2, -1)
    np.testing.assert_array_equal(outputs["spatial"].numpy(), expected)
    torch.testing.assert_close(outputs["features"], seen["last"].flatten(2).mean(-1))
    torch.testing.assert_close(outputs["logits"], outputs["features"] @ model.fc.weight.T)
    torch.testing.assert_close(alone["features"], outputs["features"][1:], rtol=1e-4, atol=1e-5)   # no mixing of images


def test_average_pooling_excludes_padding(model):
    x = torch.ones(1, 192, 35, 35)
    pooled = {}
    handle = model.Mixed_5b.branch_pool.register_forward_hook(lambda m, i, o: pooled.update(x=i[0]))
    with torch.no_grad():
        model.Mixed_5b(x)
    handle.remove()
    assert torch.equal(pooled["x"], x)


def test_files(weights, model, tmp_path):
    state = torch.load(weights, weights_only=True)
    older = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "older.pth")
    assert load_inception(tmp_path / "older.pth")[1] == load_inception(weights)[1]                # by content
    changed = {**state, "fc.weight": state["fc.weight"] + 1}
    torch.save(changed, tmp_path / "changed.pth")
    assert load_inception(tmp_path / "changed.pth")[1] != load_inception(weights)[1]
    torch.save({**older, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"1 of its tensors do not fit \(fc.weight: \(1000, 2048\) for \(1008,"):
        load_inception(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_inception(tmp_path / "missing.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"truncated, damaged or not a PyTorch file.*download it again"):
        load_inception(tmp_path / "cut.pth")
    for bias, said in ((torch.full((1008,), math.nan), "NaN"), (torch.zeros(1008, dtype=torch.complex64), "complex64")):
        torch.save({**older, "fc.bias": bias}, tmp_path / "numbers.pth")
        with pytest.raises(ValueError, match=f"fc.bias.*{said}"):
            load_inception(tmp_path / "numbers.pth")


def test_the_download_is_checked_and_kept(weights, monkeypatch, tmp_path):
    from lamamba.metrics import inception

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "URLS", (f"file://{tmp_path}/missing", weights.as_uri().replace(" ", "%20")))
    with pytest.raises(OSError, match="could not be downloaded.*invalid hash value.*weights=FILE"):
        load_inception()
    assert not list(tmp_path.rglob("*.pth"))
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    assert load_inception()[1] == load_inception(weights)[1]
    monkeypatch.setattr(inception, "URLS", ())
    assert load_inception()[1] == load_inception(weights)[1]                      # now from the disk


def test_nothing_in_a_file_is_executed(tmp_path):
    for name, save in (("a", torch.save), ("b", lambda thing, path: path.write_bytes(pickle.dumps(thing)))):
        save({"fc.weight": Bomb(tmp_path / "executed")}, tmp_path / name)
        with pytest.raises(ValueError, match="nothing from a checkpoint is executed|not a PyTorch file"):
            load_inception(tmp_path / name)
    assert not (tmp_path / "executed").exists()

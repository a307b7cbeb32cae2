"""The streamed file is what NumPy reads, and nothing half written is left."""

from __future__ import annotations

import numpy as np
import pytest

from lamamba.sampling.npz import write_npz


def pieces(images, size=3):
    return (images[start : start + size] for start in range(0, len(images), size))


def test_numpy_reads_what_was_written_by_pieces(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 5, 4, 3)).astype(np.uint8)
    labels = [3, 1, 4, 1, 5, 9, 2, 6]
    write_npz(tmp_path / "a.npz", (5, 4, 3), pieces(images), labels, 8)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], labels)
    write_npz(tmp_path / "b.npz", (5, 4, 3), pieces(images, 8), labels, 8)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_grey_images_get_three_channels_and_no_labels_no_array(tmp_path):
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    write_npz(tmp_path / "a.npz", (4, 4, 3), pieces(images), None, 2)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], np.repeat(images, 3, axis=3))


@pytest.mark.parametrize(("images", "said"), [
    (np.zeros((5, 4, 4, 3), np.uint8), "5 images came for a.npz, which is to hold 8"),
    (np.zeros((8, 4, 4, 3), np.float32), "uint8"),
    (np.zeros((8, 4, 5, 3), np.uint8), "broadcast"),
])
def test_what_does_not_fit_leaves_the_old_file(tmp_path, images, said):
    (tmp_path / "a.npz").write_text("precious")
    with pytest.raises(ValueError, match=said):
        write_npz(tmp_path / "a.npz", (4, 4, 3), pieces(images), None, 8)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]

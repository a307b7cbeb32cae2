"""The page's server: what it sends, what it refuses, and many requests at once."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.api.open_app import open_app
from lamamba.app.session import Session
from lamamba.cli.main import main
from lamamba.options.app import AppOptions
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import Model, fingerprint
from lamamba.sampling.settings import read_image_metadata
from lamamba.viz.grids import grid_picture
from tests.networks import random_network, small_config

REQUESTS = 50


@pytest.fixture(scope="module")
def server():
    """A page that listens to this computer."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    page = open_app(AppOptions(device="cpu"), in_background=True)
    yield page
    page.close()


@pytest.fixture
def client(server, tmp_path):
    from gradio_client import Client

    return Client(server.url, verbose=False, download_files=str(tmp_path))


def draw(client, classes=("4",), num=1, seed=3, sampler="flow-euler", steps=3, guidance=1.0, height=8, width=8,
        look="squares"):
    return client.predict(list(classes), num, seed, sampler, steps, guidance, height, width, look, api_name="/draw")


def test_a_picture_comes_with_its_settings(client):
    picture, status, *_ = draw(client, classes=("4", "9"), num=3, steps=5, guidance=1.5)
    facts = read_image_metadata(picture)
    assert "6 pictures in" in status
    assert facts.labels == (4, 4, 4, 9, 9, 9)
    assert facts.seeds == (3, 4, 5, 6, 7, 8)
    assert (facts.settings.steps, facts.settings.guidance.scale) == (5, 1.5)
    assert Image.open(picture).width > 400                                      # enlarged for eyes


def pixels_of(table, columns):
    """The images (n, 8, 8, 1) of a crisp table without names."""
    side = (table.width - 6) // columns - 6
    corners = [(x, y) for y in range(6, table.height, side + 6) for x in range(6, table.width, side + 6)]
    cells = [table.crop((x, y, x + side, y + side)).convert("L").resize((8, 8), Image.Resampling.NEAREST)
             for x, y in corners]
    return np.stack([np.asarray(cell)[..., None] for cell in cells])


def test_the_command_line_repeats_a_picture_of_the_page(client, tmp_path):
    picture, *_ = draw(client, num=4, steps=5, guidance=1.5)
    assert main(["sample", "--like", str(picture), "--out", str(tmp_path / "again.png")]) == 0
    assert read_image_metadata(tmp_path / "again.png") == read_image_metadata(picture)
    expected = grid_picture(pixels_of(Image.open(picture), 2), 2)
    difference = np.asarray(Image.open(tmp_path / "again.png")).astype(int) - np.asarray(expected)
    assert abs(difference).max() <= 1                                           # of 255: to rounding


def test_pixels_are_crisp(client):
    """Enlarged by a whole factor: every pixel of the 8 x 8 is one square of one colour."""
    picture, *_ = draw(client)
    image = np.asarray(Image.open(picture).convert("L"))[6:-6, 6:-6]
    factor = len(image) // 8
    squares = image.reshape(8, factor, 8, factor)
    assert factor > 20
    assert (squares == squares[:, :1, :, :1]).all()


@pytest.mark.parametrize(("change", "said"), [
    ({"classes": ()}, "No class is chosen"),
    ({"num": 20, "classes": tuple("0123456789")}, "up to 100 at once"),
    ({"seed": -1}, "-1"),
    ({"sampler": "ddpm"}, "ddpm"),
    ({"height": 10}, "multiple of 4"),
    ({"steps": 100_000}, "250"),
])
def test_wrong_inputs_get_a_message_and_no_stack_trace(client, change, said):
    with pytest.raises(Exception, match=said) as caught:
        draw(client, **change)
    assert "Traceback" not in str(caught.value)
    assert str(Path(__file__).parent.parent.parent) not in str(caught.value)


@pytest.mark.slow
def test_fifty_requests_at_once_are_all_served(server, tmp_path):
    """One after the other, each with its own seed."""
    from gradio_client import Client

    client = Client(server.url, verbose=False, download_files=str(tmp_path))
    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(lambda seed: draw(client, seed=seed, steps=1)[0], range(REQUESTS)))
    assert [read_image_metadata(answer).seeds for answer in answers] == [(seed,) for seed in range(REQUESTS)]


def test_models_of_other_kinds_have_a_page_too(tmp_path):
    """Without classes there is nothing to choose; a thousand classes are a list to search."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    from gradio_client import Client

    from lamamba.app.page import serve

    sizes = dict(in_channels=3, objective="v", grid=(8, 16))
    for num_classes, first in ((0, []), (1000, [["17", "999"]])):
        network = random_network(small_config(**sizes, num_classes=num_classes))
        model = Model("toy", network, ModelMetadata(objective="v", image_size=8), fingerprint(network), None)
        page = serve(Session(model, "toy"), host="127.0.0.1", port=None)
        client = Client(page.local_url, verbose=False, download_files=str(tmp_path))
        picture, *_ = client.predict(*first, 2, 5, "ddim", 3, 1.0, 8, 16, "smooth", api_name="/draw")
        page.close()
        facts = read_image_metadata(picture)
        assert facts.labels == (None if not first else (17, 17, 999, 999))
        assert (facts.settings.height, facts.settings.width) == (8, 16)


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['gradio'] = None; from lamamba.cli.main import main; sys.exit(main(['app']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == "lamamba app: the page needs gradio: pip install 'lamamba-diff[app]'"


def test_a_port_that_is_taken_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    assert f"port {port} is taken: give another with --port" in capsys.readouterr().err

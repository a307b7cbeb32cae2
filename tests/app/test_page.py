"""The page's server: what it sends, what it refuses, and many requests at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
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
from tests.networks import random_network, two_blocks

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
    *(({name: value}, said) for name, said, values in (
        ("num", "whole number from 1 to 100", ("x", None, [1], {}, True, 1.5, 1e300, "1")),
        ("seed", "whole number from 0 to", ("a", 0.5, {}, False, [], -0.5, 2**40)),
        ("sampler", "is unknown", (5, ["flow-euler"], {}, "")),
        ("steps", "whole number from 1 to 1 000", ("many", 2.5, True, [1], 0)),
        ("guidance", "must be a number from 0 to 20", ("x", True, [1], {}, -1, 1e300)),
        ("height", "whole number from 4 to 32", ("x", {}, [8], 2.5, True, 10**9)),
        ("look", "is unknown", (5, None, ["squares"], {}, "round")),
    ) for value in values),
])
def test_wrong_inputs_get_a_message_and_no_stack_trace(client, capfd, change, said):
    with pytest.raises(Exception, match=said) as caught:
        draw(client, **change)
    assert "Traceback" not in str(caught.value)
    assert str(Path(__file__).parent.parent.parent) not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("classes", [5, [5], [["4"]], {"4": 1}, [None], [{"4": 1}]])
def test_classes_are_a_list_of_names(client, capfd, classes):
    with pytest.raises(Exception, match="must be a list of names"):
        client.predict(classes, 1, 3, "flow-euler", 3, 1.0, 8, 8, "squares", api_name="/draw")
    assert "Traceback" not in "".join(capfd.readouterr())


def send(server, path, body=b"", method="POST", **headers):
    """Status and text of an HTTP request to the page."""
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url.rstrip("/") + path, body or None, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


GOOD = {"data": [["4"], 1, 3, "flow-euler", 3, 1.0, 8, 8, "squares", 1]}
CALL, JOIN = "/gradio_api/call/draw", "/gradio_api/queue/join"
FILE = {"path": "http://127.0.0.1:9/x", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(("path", "body", "status"), [
    (CALL, GOOD, 200), (CALL, {"data": GOOD["data"][:3]}, 422), (CALL, {"data": 5}, 422), (CALL, {}, 422),
    (CALL, [], 422), (CALL, b"{", 422), (CALL, b"\xff", 422), (CALL, b"[" * 50_000, 422),
    (CALL, {"data": [FILE, *GOOD["data"][1:]]}, 422), (CALL + "/", GOOD, 200),
    ("/gradio_api/call/nothing", GOOD, 404), (JOIN, {**GOOD, "fn_index": 99, "session_hash": "a"}, 404),
    (JOIN, {**GOOD, "fn_index": [2], "session_hash": "a"}, 404), (JOIN, GOOD, 404),
    (JOIN, {"data": [], "fn_index": 2, "session_hash": "a"}, 422),
    ("/gradio_api/call/v2/draw", GOOD, 403), ("/gradio_api/upload", b"x" * 1000, 403), ("/upload", b"x", 403),
    ("/gradio_api/vibe-edit", {"prompt": "x"}, 403), ("/gradio_api/process_recording", b"x", 403),
    (CALL, b" " * 200_000, 413),
])
def test_posts_are_calls_that_fit_or_are_refused_without_a_stack_trace(server, capfd, path, body, status):
    assert send(server, path, body)[0] == status
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_upload_is_not_kept(server):
    kept = Path(os.environ["GRADIO_TEMP_DIR"])
    boundary = "--a\r\nContent-Disposition: form-data; name=\"files\"; filename=\"upload.png\"\r\n\r\nx\r\n--a--\r\n"
    status, said = send(server, "/gradio_api/upload", boundary.encode(), Content_Type="multipart/form-data; boundary=a")
    assert (status, "takes no files" in said) == (403, True)
    assert not list(kept.rglob("upload*"))


@pytest.mark.parametrize(("origin", "status"), [
    ("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403), ("http://evil.example/127.0.0.1", 403),
    ("", 403), ("OWN", 200), ("OWN.evil.example", 403),
])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_origins_are_refused(server, origin, status, method):
    origin = origin.replace("OWN", server.url.rstrip("/"))
    path = CALL if method == "POST" else "/gradio_api/info"
    got = send(server, path, GOOD if method == "POST" else b"", method, Origin=origin)
    assert got[0] == (405 if method == "OPTIONS" and status == 200 else status)


HOSTILE = """
import os, sys, tempfile
from lamamba.api.open_app import open_app
from lamamba.options.app import AppOptions
page = open_app(AppOptions(device="cpu"), in_background=True)
sys.path.insert(0, sys.argv[1])
from tests.app.test_page import CALL, GOOD, send
assert send(page, CALL, GOOD)[0] == 200
from urllib.request import ProxyHandler, build_opener
folder = os.environ["GRADIO_TEMP_DIR"]
assert os.path.isdir(folder) and os.stat(folder).st_mode & 0o77 == 0
page.close()
print(folder, os.environ.get("NO_PROXY"), os.environ.get("no_proxy"))
"""


def test_proxies_and_a_temporary_folder_of_somebody_else_do_not_matter(tmp_path):
    """Proxies that answer nothing, of a kind that httpx has no package for; /tmp/gradio is a file."""
    (tmp_path / "gradio").write_text("of another user")
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {name: text for name, text in os.environ.items() if name not in ("GRADIO_TEMP_DIR", "no_proxy")}
    environment |= {**dead, "all_proxy": "socks5://127.0.0.1:9", "TMPDIR": str(tmp_path), "NO_PROXY": "x.example"}
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, root], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder, *proxies = done.stdout.splitlines()[-1].split()
    assert Path(folder).parent == tmp_path
    assert proxies == ["x.example", "None"]
    assert not Path(folder).exists()                                            # nothing stays behind


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
        network = random_network(two_blocks(**sizes, num_classes=num_classes))
        model = Model("toy", network, ModelMetadata(objective="v", image_size=8), fingerprint(network), None)
        page = serve(Session(model, "toy"), host="127.0.0.1", port=None)
        client = Client(page.local_url, verbose=False, download_files=str(tmp_path))
        picture, *_ = client.predict(*first, 2, 5, "ddim", 3, 1.0, 8, 16, "smooth", api_name="/draw")
        page.close()
        facts = read_image_metadata(picture)
        assert facts.labels == (None if not first else (17, 17, 999, 999))
        assert (facts.settings.height, facts.settings.width) == (8, 16)


def test_the_page_shows_names_and_takes_what_finds_them():
    pytest.importorskip("gradio", reason="the page needs gradio")
    from lamamba.app.page import build_page

    network = random_network(two_blocks(num_classes=3))
    metadata = ModelMetadata(objective=network.architecture.objective, image_size=8, label_names=("1", "10", "tea"))
    model = Model("toy", network, metadata, fingerprint(network), None)
    page = build_page(Session(model, "toy"))
    (chooser,) = (block for block in page.blocks.values() if getattr(block, "elem_id", None) == "classes")
    assert chooser.choices == [("1", "0"), ("10", "1"), ("tea", "tea")]


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['gradio'] = None; from lamamba.cli.main import main; sys.exit(main(['app']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == "lamamba app: the page needs gradio: pip install 'lamamba-diff[app]'"


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "300.1.1.1", "a" * 70 + ".x", "::2", "a b"])
def test_a_host_that_is_not_this_computer_is_named(capsys, host):
    assert main(["app", "--host", host]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lamamba app: the page cannot be at {host}, port ")
    assert "127.0.0.1 is this computer alone" in said


@pytest.mark.parametrize("given", [True, False])
def test_ports_that_are_taken_are_named(capsys, monkeypatch, given):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("lamamba.api.open_app.FIRST_PORTS", range(port, port + 1))
        assert main(["app", *(["--port", str(port)] if given else [])]) == 2
    expected = f"port {port} is taken" if given else f"ports {port} to {port} are all taken"
    assert f"{expected}: give another with --port" in capsys.readouterr().err

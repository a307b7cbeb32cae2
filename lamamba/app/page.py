"""The page: gradio's components around a Session."""

from __future__ import annotations

import html
import os
import random
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image
from starlette.middleware import Middleware

from lamamba.app.requests import RequestFilter
from lamamba.app.session import MAX_CACHE, MAX_SEED, Frame, Request, Session
from lamamba.config import check_known
from lamamba.data.labels import texts_for
from lamamba.diffusion.denoise import SAMPLERS
from lamamba.sampling.settings import png_text
from lamamba.utils.text import counted, shown
from lamamba.viz.grids import grid_picture

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of an event: no overlay over what it changes, and no endpoint of its own."""
SQUARES, SMOOTH = "squares", "smooth"
SMALL = 64
"""Images with smaller sides in pixels are enlarged, as squares or smoothly."""
FEW_CLASSES = 20
"""Up to so many classes are checkboxes; more are a list to search."""
QUEUE_SIZE = 200
"""Requests that may wait; the next one is refused."""
PICTURE_WIDTH, PICTURE_HEIGHT = 640, 560
"""Of the frame around the picture, in the browser's pixels."""
MARGIN, GAP = 40, 6
"""Left of a row, for its name; between images."""
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container main, .gradio-container .column { width: 100%; }
#picture img { object-fit: scale-down; }
#seed-row { align-items: end; }
#dice { max-height: 42px; min-height: 38px; margin-bottom: 12px; white-space: nowrap; padding: 0 8px; }
#status { min-height: 3.2em; }
#status .bar { height: 6px; border-radius: 3px; background: var(--neutral-200); overflow: hidden; margin-top: 6px; }
#status .bar > i { display: block; height: 100%; background: var(--primary-500); }
#head h1 { margin: 0 0 2px 0; }
#head p { margin: 0; color: var(--body-text-color-subdued); }
@media (max-width: 760px) {
  #shown { order: -1; }
  #picture, #picture .image-container { height: 55vh !important; }
}
"""


def theme() -> Any:
    """Fonts of the visitor's system: the page loads nothing from other hosts."""
    return gr.themes.Soft(
        primary_hue="blue", font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )


def build_page(session: Session) -> Any:
    """The page: controls on the left, the picture on the right.

    Returns:
        A gradio Blocks with the endpoint /draw, queued: one request at a time is sampled, the others wait.
    """
    with gr.Blocks(title="LaMamba-Diff", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(_heading(session), elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                controls = _build_controls(session)
            with gr.Column(scale=6, min_width=340, elem_id="shown"):
                outputs = _build_outputs()
        _connect(_Handlers(session), controls, outputs)
    page.queue(default_concurrency_limit=1, max_size=QUEUE_SIZE)
    return page


def serve(session: Session, *, host: str, port: int | None, share: bool = False, browser: bool = False) -> Any:
    """Start a server of the page and return the running gradio Blocks; its close() ends it.

    Raises:
        OSError: when the port is taken.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    page = build_page(session)
    functions = [each for each in page.get_config_file()["dependencies"] if each["backend_fn"]]
    page.launch(
        server_name=host, server_port=port, share=share, inbrowser=browser, show_error=False, theme=theme(), css=CSS,
        footer_links=[], ssr_mode=False, mcp_server=False, run_history=False, prevent_thread_lock=True, quiet=True,
        inline=False, app_kwargs={"middleware": [Middleware(RequestFilter, functions=functions)]},
    )
    return page


@dataclass(frozen=True)
class _Controls:
    """Components of the left column."""

    settings: list[Any]
    """Inputs of /draw, in its order."""
    seed: Any
    new_seed: Any
    go: Any
    stop: Any
    scaling: Any


class _Outputs(NamedTuple):
    """Components of the right column."""

    picture: Any
    status: Any
    save: Any
    command: Any
    last_sample: Any
    """A state: the images on the page, where they can be shown with another scaling."""


def _build_controls(session: Session) -> _Controls:
    names = list(session.class_names)
    classes = _class_chooser(list(zip(names, texts_for(names), strict=True)))
    num_images = gr.Slider(1, 20, value=8, step=1, label="Pictures of each" if names else "Pictures")
    with gr.Row(elem_id="seed-row"):
        seed = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=3, min_width=120,
            info="the same seed, the same pictures",
        )
        new_seed = gr.Button("New seed", scale=1, min_width=100, size="md", elem_id="dice")
    with gr.Row():
        go = gr.Button("Draw", variant="primary", size="lg", elem_id="go", scale=3)
        stop = gr.Button("Stop", size="lg", elem_id="stop", scale=1, min_width=90)
    with gr.Accordion("Steps, guidance, sampler, size", open=False, elem_id="more"):
        most, usual = (8, 2) if session.samplers == ["flow-map"] else (250, 25)
        steps = gr.Slider(1, most, value=usual, step=1, label="Steps", info="more: finer, slower")
        guidance = gr.Slider(
            *session.guidance_range, value=session.default_guidance, step=0.05, label="Guidance",
            visible=bool(names) and session.guidance_range[0] < session.guidance_range[1],
            info="1: none; more: clearer, with less variety",
        )
        sampler = gr.Radio(
            [(f"{name}: {SAMPLERS[name].what}", name) for name in session.samplers], value=session.samplers[0],
            label="Sampler", elem_id="sampler",
        )
        with gr.Row():
            sides = [
                gr.Slider(
                    session.side_multiple, session.max_side, value=side, step=session.side_multiple, label=label,
                    min_width=120,
                )
                for label, side in zip(("Height", "Width"), session.size, strict=True)
            ]
        cache = gr.Slider(
            1, MAX_CACHE, value=1, step=1, label="All depths every ... steps",
            info="1: in each; 2 or 3 save a third to a half of the time",
        )
    scaling = gr.Radio(
        [SQUARES, SMOOTH], value=SQUARES, label="Show pixels as", visible=max(session.size) < SMALL, elem_id="look"
    )
    settings = [classes, num_images, seed, sampler, steps, guidance, *sides, scaling, cache]
    return _Controls(settings, seed, new_seed, go, stop, scaling)


def _class_chooser(choices: list[tuple[str, str]]) -> Any:
    """Of names, and what /draw takes for them."""
    if not choices:
        return gr.State([])
    values = [value for _, value in choices]
    if len(choices) <= FEW_CLASSES:
        return gr.CheckboxGroup(
            choices, value=values[:10], label="Classes, a row each", show_select_all=True, elem_id="classes"
        )
    return gr.Dropdown(
        choices, value=values[:1], multiselect=True, label="Classes, a row each", info="type to search",
        elem_id="classes",
    )


def _build_outputs() -> _Outputs:
    picture = gr.Image(
        label="Picture", show_label=False, format="png", interactive=False, elem_id="picture", buttons=["fullscreen"],
        height=PICTURE_HEIGHT, alt_text="what the network has drawn", placeholder="Press Draw",
    )
    status = gr.HTML(
        "Choose what to draw, then press <b>Draw</b>: noise becomes pictures, step by step.", elem_id="status"
    )
    last_sample = gr.State(None)
    save = gr.DownloadButton("Save picture with its settings", interactive=False, elem_id="keep")
    command = gr.Markdown("", elem_id="repeat")
    return _Outputs(picture, status, save, command, last_sample)


def _connect(handlers: _Handlers, controls: _Controls, outputs: _Outputs) -> None:
    status, at_once = outputs.status, {**QUIET, "queue": False}
    controls.new_seed.click(lambda: random.randrange(2**31), outputs=controls.seed, **at_once)
    sampling = controls.go.click(lambda: "Waiting for its turn ...", outputs=status, **at_once).then(
        handlers.draw, controls.settings, list(outputs), show_progress="hidden", api_name="draw", preprocess=False,
    )
    sampling.failure(lambda: "Stopped.", outputs=status, **at_once)             # gradio takes a stop for a failure
    controls.stop.click(lambda: "Stopped.", outputs=status, cancels=[sampling], **at_once)
    controls.scaling.change(
        handlers.rescale, [outputs.last_sample, controls.scaling], list(outputs), preprocess=False, **QUIET
    )


@dataclass(frozen=True)
class _Sample:
    """Images on the page."""

    request: Request
    images: np.ndarray


class _Handlers:
    """What events of the page do; each yields values of `_Outputs`."""

    def __init__(self, session: Session):
        self._session = session

    def draw(
        self, classes: Any, num: Any, seed: Any, sampler: Any, steps: Any, guidance: Any, height: Any, width: Any,
        look: Any, cache: Any = 1,
    ) -> Iterator[tuple[Any, ...]]:
        """Sample with the controls' values, as they came; parameter names are those of the endpoint /draw."""
        try:
            request = Request(
                classes=_as_names(classes), num_images=_whole(num), seed=_whole(seed), sampler=sampler,
                steps=_whole(steps), guidance=1.0 if guidance is None else guidance, height=_whole(height),
                width=_whole(width), cache=1 if cache is None else _whole(cache),
            )
            check_known("way to show pixels", look, (SQUARES, SMOOTH))
            for frame in self._session.sample(request):
                sample = _Sample(request, frame.images)
                if frame.is_last:
                    yield from self._finished(sample, look, _status(frame))
                else:
                    yield self._grid(sample, look), _status(frame), gr.update(interactive=False), "", None
        except (ValueError, RuntimeError, MemoryError, FloatingPointError) as error:
            raise gr.Error(html.escape(_sentence(error)), title="That does not work", print_exception=False) from None

    def rescale(self, sample: _Sample | None, look: str) -> Iterator[tuple[Any, ...]]:
        """Show the last images as squares or smoothly."""
        if sample is not None:
            yield from self._finished(sample, look, gr.skip())

    def _finished(self, sample: _Sample, look: str, status: Any) -> Iterator[tuple[Any, ...]]:
        is_small = max(self._session.size) < SMALL
        with tempfile.TemporaryDirectory() as folder:                           # gradio copies the file at the yield
            path = Path(folder) / _file_name(sample.request)
            text = png_text(self._session.metadata_of(sample.request))
            self._grid(sample, look).save(path, format="PNG", pnginfo=text)
            save = gr.update(value=str(path), interactive=True)
            yield str(path), status, save, _command(path.name), sample if is_small else None

    def _grid(self, sample: _Sample, look: str) -> Image.Image:
        columns, row_names = self._session.columns_of(sample.request), self._session.row_names_of(sample.request)
        cell = _cell_pixels(columns, len(sample.images), bool(row_names))
        return grid_picture(sample.images, columns, row_names, cell_pixels=cell, crisp=look == SQUARES)


def _cell_pixels(columns: int, count: int, has_names: bool) -> int:
    """Width of an image for a grid that fills the picture's frame without further scaling."""
    rows = -(-count // columns)
    margin = MARGIN if has_names else 0
    return max(8, min((PICTURE_WIDTH - margin - GAP) // columns, (PICTURE_HEIGHT - GAP) // rows) - GAP)


def _heading(session: Session) -> str:
    height, width = session.size
    classes = counted(len(session.class_names), "class") if session.class_names else "no classes"
    return (
        f"<h1>LaMamba-Diff</h1><p>{html.escape(session.title)}: {session.num_parameters / 1e6:.2f} M parameters, "
        f"{classes}, {width} x {height} pixels, on {html.escape(session.device)}</p>"
    )


def _status(frame: Frame) -> str:
    if frame.is_last:
        text = f"{counted(len(frame.images), 'picture')} in {frame.seconds:.1f} s"
    else:
        text = f"step {frame.done} of {frame.total}: the clean picture as the network predicts it now"
    share = 100 * frame.done / max(1, frame.total)
    return f'{text}<div class="bar"><i style="width:{share:.0f}%"></i></div>'


def _file_name(request: Request) -> str:
    classes = "-".join(request.classes[:10])
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in classes)[:60]
    return f"lamamba_{plain + '_' if plain else ''}seed{request.seed}.png"


def _command(name: str) -> str:
    return f"The file holds its settings; to make it again: `lamamba sample --like {shlex.quote(name)} --out again.png`"


def _as_names(classes: Any) -> tuple[str, ...]:
    """The classes that were chosen, some or none; a single name serves, too."""
    names = (classes,) if isinstance(classes, str) else () if classes is None else classes
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes is {shown(classes)}; it must be a list of names, as in [\"3\", \"7\"]")
    return tuple(names)


def _whole(value: Any) -> Any:
    """2.0, as number fields give it, as 2; anything else unchanged, for `Session.check` to name."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sentence(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text[0].upper() + text[1:] + "."

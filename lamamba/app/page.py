"""The page: gradio's parts around a Session."""

from __future__ import annotations

import html
import os
import random
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from lamamba.app.session import MAX_GUIDANCE, MAX_SEED, Frame, Request, Session
from lamamba.diffusion.denoise import SAMPLERS
from lamamba.sampling.settings import png_text

Compose = Callable[[np.ndarray, int, list[str], int, bool], Image.Image]
"""(images (n, h, w, c) uint8, columns, names of the rows, width of an image on the page, pixels as squares) -> one
picture."""

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of an event: no veil over what it changes, and nothing that programs would call."""
SQUARES, SMOOTH = "squares", "smooth"
SMALL = 64
"""Pixels: below, an image is enlarged so much that it matters how."""
FEW_CLASSES = 20
"""So many are boxes to tick; more are a list to search."""
WAITING = 200
"""Requests that may wait for their turn; the next one is told to come back later."""
PICTURE_WIDTH, PICTURE_HEIGHT = 640, 560
"""Of the frame that the drawing is enlarged into, in a browser's pixels."""
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
"""


def theme() -> Any:
    """Fonts of the visitor's own system: the page loads nothing from elsewhere."""
    return gr.themes.Soft(
        primary_hue="blue", font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )


@dataclass(frozen=True)
class Drawn:
    """What a visitor sees."""

    request: Request
    images: np.ndarray


def build_page(studio: Session, compose: Compose) -> Any:
    """The page: controls on the left, the drawing on the right.

    Args:
        studio: what draws.
        compose: lays images out as a table.

    Returns:
        A gradio Blocks, queued so that one request is drawn at a time and the others wait for their turn.
    """
    names = list(studio.class_names)

    is_small = max(studio.size) < SMALL

    def table(drawn: Drawn, look: str) -> Image.Image:
        columns, rows = studio.columns_of(drawn.request), list(studio.row_names_of(drawn.request))
        cell = _cell_pixels(columns, len(drawn.images), bool(rows))
        return compose(drawn.images, columns, rows, cell, look == SQUARES)

    def finish(drawn: Drawn, look: str, status: str, kept: Drawn | None) -> Iterator[tuple[Any, ...]]:
        with tempfile.TemporaryDirectory() as folder:                           # gradio keeps a copy of what it sends
            place = Path(folder) / _file_name(drawn.request)
            table(drawn, look).save(place, format="PNG", pnginfo=png_text(studio.facts_of(drawn.request)))
            yield str(place), status, gr.update(value=str(place), interactive=True), _repeat(place.name), kept

    def look_again(kept: Drawn | None, look: str) -> Iterator[tuple[Any, ...]]:
        if kept is not None:
            yield from finish(kept, look, gr.skip(), kept)

    def draw(
        classes: list[str] | str | None, num: float, seed: float, sampler: str, steps: float, guidance: float,
        height: float, width: float, look: str,
    ) -> Iterator[tuple[Any, ...]]:
        try:
            request = Request(
                classes=tuple([classes] if isinstance(classes, str) else classes or ()), num=_whole(num),
                seed=_whole(seed), sampler=sampler, steps=_whole(steps), guidance=_number(guidance),
                height=_whole(height), width=_whole(width),
            )
            for frame in studio.draw(request):
                drawn = Drawn(request, frame.images)
                if frame.is_last:
                    yield from finish(drawn, look, _status(frame), drawn if is_small else None)
                else:
                    yield table(drawn, look), _status(frame), gr.update(interactive=False), "", None
        except (ValueError, RuntimeError, MemoryError) as error:
            raise gr.Error(html.escape(_sentence(error)), title="That does not work", print_exception=False) from None

    with gr.Blocks(title="LaMamba-Diff", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(_heading(studio), elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                classes = _class_chooser(names)
                num = gr.Slider(1, 20, value=8, step=1, label="Pictures of each" if names else "Pictures")
                with gr.Row(elem_id="seed-row"):
                    seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=3, min_width=120,
                        info="the same seed, the same pictures",
                    )
                    dice = gr.Button("New seed", scale=1, min_width=100, size="md", elem_id="dice")
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", size="lg", elem_id="go", scale=3)
                    stop = gr.Button("Stop", size="lg", elem_id="stop", scale=1, min_width=90)
                with gr.Accordion("Steps, guidance, sampler, size", open=False, elem_id="more"):
                    steps = gr.Slider(1, 250, value=25, step=1, label="Steps", info="more: finer, slower")
                    guidance = gr.Slider(
                        0, MAX_GUIDANCE / 2, value=1.75 if names else 1.0, step=0.05, label="Guidance",
                        visible=bool(names), info="1: none; more: clearer, with less variety",
                    )
                    sampler = gr.Radio(
                        [(f"{name}: {SAMPLERS[name].what}", name) for name in studio.samplers],
                        value=studio.samplers[0], label="Sampler", elem_id="sampler",
                    )
                    with gr.Row():
                        sides = [
                            gr.Slider(
                                studio.side_step, studio.max_side, value=own, step=studio.side_step, label=label,
                                min_width=120,
                            )
                            for label, own in (("Height", studio.size[0]), ("Width", studio.size[1]))
                        ]
                look = gr.Radio(
                    [SQUARES, SMOOTH], value=SQUARES, label="Show pixels as", visible=is_small, elem_id="look"
                )
            with gr.Column(scale=6, min_width=340):
                picture = gr.Image(
                    label="Picture", show_label=False, format="png", interactive=False, elem_id="picture",
                    buttons=["fullscreen"], height=PICTURE_HEIGHT, alt_text="what the network has drawn",
                    placeholder="Press Draw",
                )
                status = gr.HTML(_hint(), elem_id="status")
                kept = gr.State(None)
                keep = gr.DownloadButton("Save picture with its settings", interactive=False, elem_id="keep")
                repeat = gr.Markdown("", elem_id="repeat")
        shown, at_once = [picture, status, keep, repeat, kept], {**QUIET, "queue": False}
        dice.click(lambda: random.randrange(2**31), outputs=seed, **at_once)
        drawing = go.click(lambda: "Waiting for its turn ...", outputs=status, **at_once).then(
            draw, [classes, num, seed, sampler, steps, guidance, *sides, look], shown, show_progress="hidden",
            api_name="draw",
        )
        drawing.failure(lambda: "Stopped.", outputs=status, **at_once)    # to gradio, a stop is a failure, too
        stop.click(lambda: "Stopped.", outputs=status, cancels=[drawing], **at_once)
        look.change(look_again, [kept, look], shown, **QUIET)
    page.queue(default_concurrency_limit=1, max_size=WAITING)
    return page


def serve(
    studio: Session, compose: Compose, *, host: str, port: int | None, share: bool = False, browser: bool = False,
    in_background: bool = False,
) -> Any:
    """Show the page until somebody presses Ctrl-C; or come back at once with the page, whose close() ends it.

    Raises:
        OSError: when the port is taken.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")                  # nobody is told that a page was opened
    page = build_page(studio, compose)
    page.launch(
        server_name=host, server_port=port, share=share, inbrowser=browser, show_error=False, theme=theme(), css=CSS,
        footer_links=[], ssr_mode=False, mcp_server=False, run_history=False, prevent_thread_lock=in_background,
        quiet=in_background,
    )
    return page


def _cell_pixels(columns: int, count: int, has_names: bool) -> int:
    """Width of an image, so that the table fills the picture's frame without being scaled once more."""
    rows = -(-count // columns)
    margin = MARGIN if has_names else 0
    return max(8, min((PICTURE_WIDTH - margin - GAP) // columns, (PICTURE_HEIGHT - GAP) // rows) - GAP)


def _class_chooser(names: list[str]) -> Any:
    if not names:
        return gr.State([])
    if len(names) <= FEW_CLASSES:
        return gr.CheckboxGroup(
            names, value=names[:10], label="Classes, a row each", show_select_all=True, elem_id="classes"
        )
    return gr.Dropdown(
        names, value=names[:1], multiselect=True, label="Classes, a row each", info="type to search", elem_id="classes"
    )


def _heading(studio: Session) -> str:
    height, width = studio.size
    classes = f"{len(studio.class_names)} classes" if studio.class_names else "no classes"
    return (
        f"<h1>LaMamba-Diff</h1><p>{html.escape(studio.name)}: {studio.parameters / 1e6:.2f} M parameters, {classes}, "
        f"{width} x {height} pixels, on {html.escape(str(studio.model.device))}</p>"
    )


def _hint() -> str:
    return "Choose what to draw, then press <b>Draw</b>: noise becomes pictures, step by step."


def _status(frame: Frame) -> str:
    if frame.is_last:
        count = len(frame.images)
        text = f"{count} {'picture' if count == 1 else 'pictures'} in {frame.seconds:.1f} s"
    else:
        text = f"step {frame.done} of {frame.total}: the clean picture as the network imagines it now"
    share = 100 * frame.done / max(1, frame.total)
    return f'{text}<div class="bar"><i style="width:{share:.0f}%"></i></div>'


def _file_name(request: Request) -> str:
    what = "-".join(request.classes[:10])
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in what)[:60]
    return f"lamamba_{plain + '_' if plain else ''}seed{request.seed}.png"


def _repeat(name: str) -> str:
    return f"The file knows how it was made: `lamamba sample --like {shlex.quote(name)} --out again.png`"


def _whole(value: Any) -> Any:
    """2.0, as a number field gives it, as 2; anything else as it is, for the studio to refuse by name."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    return 1.0 if value is None else value


def _sentence(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text[0].upper() + text[1:] + "."

"""The command `lamamba`: finds the verb, hands it the rest of the line, and turns what goes wrong into one line."""

from __future__ import annotations

import importlib
import logging
import os
import sys

from lamamba._version import __version__
from lamamba.config import unknown_name

VERBS = {
    "demo": "train on handwritten digits before your eyes, and see what the model learned",
    "data": "check data before training: decode every image, name the bad ones; verify latents",
    "encode": "images to latents of an autoencoder on disk, once, by any number of processes",
    "train": "train a network from a recipe (or resume: run the same command again)",
    "sample": "make pictures with a trained network",
    "app": "a page in the browser to play on",
    "evaluate": "FID and its kin, with the whole protocol beside every figure",
    "plot": "loss, gradient norm and speed of one or several runs as a picture",
    "info": "parameters, multiply-adds and memory of a network, without allocating it",
    "bench": "LaMamba beside DiT: images per second, memory, multiply-adds",
    "doctor": "what runs here and why: versions, back ends, compilers, a quick check of each",
    "export": "a trained network as a diffusers pipeline, with a model card; ONNX",
    "convert": "official checkpoints to our format and back",
}

HELP = f"""lamamba {__version__}: image diffusion in linear time (LaMamba-Diff, arXiv 2408.02615)

usage: lamamba VERB [options]          lamamba VERB --help explains a verb

{chr(10).join(f"  {verb:<10}{what}" for verb, what in VERBS.items())}

a first walk:
  lamamba demo                                         five minutes on a laptop; writes demo/report.md
  lamamba train digits --out runs/digits               the same training by itself; --dry-run shows the plan
  lamamba sample runs/digits --classes 3,7 --out grid.png
  lamamba app                                          the digits of the package, in a browser
  lamamba info xl --image-size 512                     what the paper's largest network costs
  lamamba doctor                                       which back end this machine will use, and what is missing

environment:
  LAMAMBA_BACKEND     back end of the scan (triton, cpu, torch, reference); by default the fastest that runs here
  LAMAMBA_TRACEBACK   set to 1 to see where an error came from
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 for what the user can mend, 130 for Ctrl-C, 141 for a closed pipe.

    75 is a training that a signal has stopped after a checkpoint: the same command resumes it.
    """
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _show_notes()
    try:
        if verb in ("-h", "--help", "help"):
            print(HELP)
        elif verb in ("-V", "--version"):
            print(f"lamamba {__version__}")
        elif verb in VERBS:
            importlib.import_module(f"lamamba.cli.{verb}").main(rest)
        else:
            raise unknown_name("verb", verb, VERBS)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:                                                     # as in: lamamba info xl | head -3
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("LAMAMBA_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split())
        name = f"lamamba {verb}" if verb in VERBS else "lamamba"
        print(f"{name}: {message or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


class _Notes(logging.Handler):
    """Shows what the library logs: notes on standard output, warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        stream = sys.stderr if is_warning else sys.stdout
        print(("warning: " if is_warning else "") + record.getMessage(), file=stream, flush=True)


def _show_notes() -> None:
    """Let the logger "lamamba" speak here; main may be called many times in a process."""
    logger = logging.getLogger("lamamba")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())


if __name__ == "__main__":
    sys.exit(main())

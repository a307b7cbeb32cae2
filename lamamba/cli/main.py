"""The command `lamamba`: calls the verb with the rest of the command line; exceptions become one line and a status."""

from __future__ import annotations

import importlib
import logging
import os
import sys

from lamamba._version import __version__
from lamamba.config import unknown_name
from lamamba.training.interrupt import EXIT_INTERRUPTED, Interrupted
from lamamba.utils.errors import RankZeroError

VERBS = {
    "demo": "train on handwritten digits in five minutes, sample, evaluate, and write a report",
    "data": "check data before training: decode every image, name the bad ones; verify latents",
    "encode": "images to latents of an autoencoder on disk, once, by any number of processes",
    "train": "train a network from a recipe (or resume: run the same command again)",
    "sample": "images from a trained network",
    "app": "sample in the browser",
    "evaluate": "FID and other figures, each with its whole protocol",
    "plot": "loss, gradient norm and speed of one or several runs as a picture",
    "info": "parameters, multiply-adds and memory of a network, without allocating it",
    "bench": "LaMamba beside DiT: images per second, memory, multiply-adds",
    "doctor": "versions, compilers, the back end of each operator and why, a check of each",
    "export": "a trained network as a diffusers pipeline, with a model card; ONNX",
    "convert": "official checkpoints to our format and back",
}

HELP = f"""lamamba {__version__}: image diffusion in linear time (LaMamba-Diff, arXiv 2408.02615)

usage: lamamba VERB [options]          lamamba VERB --help explains a verb

{chr(10).join(f"  {verb:<10}{what}" for verb, what in VERBS.items())}

first steps:
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


EXIT_FAILURE, EXIT_CTRL_C, EXIT_CLOSED_PIPE = 2, 130, 141


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words of the command line; by default those of this process.

    Returns:
        The exit status: 0; 1 when `lamamba doctor` has found a fault; 2 for what the user can mend; 75 for a training
        that a signal has stopped after a checkpoint (the same command resumes it); 130 for Ctrl-C; 141 for a closed
        pipe.
    """
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _show_notes()
    status = None
    try:
        if verb in ("-h", "--help", "help"):
            print(HELP)
        elif verb in ("-V", "--version"):
            print(f"lamamba {__version__}")
        elif verb in VERBS:
            status = importlib.import_module(f"lamamba.cli.{verb}").main(rest)
        else:
            raise unknown_name("verb", verb, VERBS)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return EXIT_CTRL_C
    except BrokenPipeError:                                                     # as in: lamamba info xl | head -3
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        return EXIT_INTERRUPTED
    except RankZeroError:                                                    # rank 0 prints the failure
        return EXIT_FAILURE
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("LAMAMBA_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split())
        name = f"lamamba {verb}" if verb in VERBS else "lamamba"
        print(f"{name}: {message or type(error).__name__}", file=sys.stderr)
        return EXIT_FAILURE
    return status or 0


class _Notes(logging.Handler):
    """Shows what the library logs: notes on standard output, warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        stream = sys.stderr if is_warning else sys.stdout
        try:
            print(("warning: " if is_warning else "") + record.getMessage(), file=stream, flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            pass                                                               # a full disk costs the note, not the run


def _show_notes() -> None:
    """Add the handler to the logger "lamamba", once in a process."""
    logger = logging.getLogger("lamamba")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())


if __name__ == "__main__":
    sys.exit(main())

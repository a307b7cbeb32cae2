"""The command `lamamba`: calls the verb with the rest of the command line; exceptions become one line and a status."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, metadata

from lamamba._version import __version__
from lamamba.config import unknown_name
from lamamba.training.interrupt import EXIT_INTERRUPTED, Interrupted
from lamamba.utils.errors import RankZeroError
from lamamba.utils.files import check_current_folder

VERBS = {
    "demo": "train on handwritten digits in five minutes, sample, evaluate, and write a report",
    "data": "check data before training: decode every image, name the bad ones; verify latents",
    "encode": "images to latents of an autoencoder on disk, once, by any number of processes",
    "train": "train a network from a recipe (or resume: run the same command again)",
    "sample": "images from a trained network",
    "app": "sample in the browser",
    "compress": "half the layers, chosen by LAPTOP-Diff's criterion, and healed by distillation",
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

exit status: 0; 1 a fault that doctor found; 2 what you can mend; 70 a bug; 75 stopped by a signal; 130 Ctrl-C
"""


FORESEEN = (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError, ImportError)
"""What a user or an administrator can mend; anything else is a bug."""
EXIT_FAILURE, EXIT_BUG, EXIT_CTRL_C, EXIT_CLOSED_PIPE = 2, 70, 130, 141


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words of the command line; by default those of this process.

    Returns:
        The exit status: 0; 1 when `lamamba doctor` has found a fault; 2 for what the user can mend; 70 for an exception
        that nobody foresaw, whose traceback is written to a file; 75 for a training that a signal has stopped after a
        checkpoint (the same command resumes it); 130 for Ctrl-C; 141 for a closed pipe.
    """
    for stream in (sys.stdout, sys.stderr):                                     # a character that a terminal lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _show_notes()
    status = None
    try:
        if verb in ("-h", "--help", "help"):
            print(HELP)
        elif verb in ("-V", "--version"):
            print(f"lamamba {__version__}")
        elif verb in VERBS:
            check_current_folder()                                              # before torch is loaded
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
    except RankZeroError:                                                       # rank 0 prints the failure
        return EXIT_FAILURE
    except Exception as error:
        if os.environ.get("LAMAMBA_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        is_foreseen = isinstance(error, FORESEEN) and not isinstance(error, RecursionError | NotImplementedError)
        name = f"lamamba {verb}" if verb in VERBS else "lamamba"
        print(f"{name}: {message if is_foreseen else _report_bug(error, message)}", file=sys.stderr)
        return EXIT_FAILURE if is_foreseen else EXIT_BUG
    return status or 0


def _report_bug(error: Exception, message: str) -> str:
    """Write the traceback of an exception that nobody foresaw to a file; what to do with it, in a line."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="lamamba-", suffix=".txt", delete=False) as file:
        file.write(f"lamamba {__version__}, Python {sys.version}\n{' '.join(sys.argv)}\n\n")
        file.writelines(traceback.format_exception(error))
    try:
        urls = dict(line.split(", ", 1) for line in metadata("lamamba-diff").get_all("Project-URL") or ())
    except PackageNotFoundError:                                                # run from a checkout
        urls = {}
    where = urls.get("Issues") or "those who gave you lamamba"
    return f"a bug ({type(error).__name__}: {message}); its traceback is in {file.name}: please send that to {where}"


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
    """Add the handler to the logger "lamamba", once in a process; quieten what other libraries say on import."""
    logger = logging.getLogger("lamamba")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):     # missing kernels, deprecations
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())

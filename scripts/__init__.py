"""
What `python -m scripts.NAME` imports first. While a script is still importing its packages, which
takes seconds, `run_main` is not there yet to turn the two things that happen then into one line.
"""
import os
import sys


def in_one_line(kind, error, trace):
    """sys.excepthook: a package that this Python lacks, and Ctrl-C; all else as Python has it."""
    if hasattr(sys, "ps1"):  # at Python's own prompt, which must go on
        sys.__excepthook__(kind, error, trace)
        return
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted before anything began", file=sys.stderr, flush=True)
        os._exit(130)  # 128 + SIGINT, as shells have it; an excepthook cannot set a status
    package = (getattr(error, "name", None) or "").split(".")[0]
    ours = package in ("", "nanochat", "scripts", "tasks")
    whole = os.environ.get("NANOCHAT_TRACEBACK")
    if issubclass(kind, ModuleNotFoundError) and not ours and not whole:
        print(f"error: {sys.executable} has no package {package}: use .venv/bin/python, which "
              f"bash setup_env.sh makes, or install it", file=sys.stderr, flush=True)
        os._exit(1)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = in_one_line

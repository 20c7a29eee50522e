"""``python -m icl_lib``; see :mod:`icl_lib.cli`."""

from icl_lib.cli import app

if __name__ == "__main__":
    app()

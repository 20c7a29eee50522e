"""``python -m icl_lib`` and the command ``icl-lib``; see :mod:`icl_lib.cli`."""

from icl_lib.environment import extra


def main() -> None:
    """Run the command line; without the extra that it needs, say so and exit with 2."""
    with extra("llm", command=True):
        from icl_lib.cli import app
    app()


if __name__ == "__main__":
    main()

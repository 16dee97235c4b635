"""Where the command `el4ner` and `python -m el4ner` begin: from its first import on, Ctrl-C ends with one line."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; ends with 130 if it is interrupted, while its modules load too."""
    try:
        from el4ner.cli import main as commands

        commands(prog_name="el4ner")
    except KeyboardInterrupt:
        if sys.stderr is not None:
            sys.stderr.write("el4ner: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

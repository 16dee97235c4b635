"""Where the command `el4ner` and `python -m el4ner` begin: from its first import on, Ctrl-C ends with one line."""

from __future__ import annotations

import sys

from el4ner.interrupts import INTERRUPTED, end_in_order


def main() -> None:
    """Runs the command line; ends with 130 if it is interrupted, while its modules load too."""
    try:
        end_in_order()
        from el4ner.cli import main as commands

        commands(prog_name="el4ner")
    except KeyboardInterrupt:
        if sys.stderr is not None:
            sys.stderr.write("el4ner: interrupted\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

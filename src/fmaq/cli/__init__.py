"""The command line, `fmaq`: one file a command, or a group of them; runs are driven by YAML recipes."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line: one line and exit code 2 for bad input, 1 for a failure; `--debug` shows tracebacks."""
    debug = "--debug" in sys.argv[1:]
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    from fmaq.cli.app import app
    from fmaq.cli.errors import BAD_INPUT, FAILURE, print_error

    try:
        app(prog_name="fmaq")
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        if debug:
            raise
        print_error(str(error) or type(error).__name__)
        sys.exit(BAD_INPUT)
    except Exception as error:
        if debug:
            raise
        print_error(f"{type(error).__name__}: {error} (add --debug for the traceback)")
        sys.exit(FAILURE)

"""Every error el4ner raises on purpose.

    El4nerError
    ├── UsageError            the call or command line is wrong              exit code 2
    │   ├── ConfigError       a setting or configuration file is wrong
    │   └── InputError        a whole input file cannot be read
    │       ├── PoolError     a labelled sentence is wrong (offsets, labels)
    │       └── LabelsError   a label definition file is wrong
    ├── EngineError           a model cannot be loaded or run                exit code 1
    │   └── ModelNotFoundError    nothing of that name is installed           exit code 2
    └── KernelError           a compute kernel cannot run                     exit code 1
        └── ShapeError        an array has the wrong shape or dtype

A message says what came, what is allowed, and what to do about it.
"""

from __future__ import annotations

import os


def debugging() -> bool:
    """Whether tracebacks are wanted: EL4NER_DEBUG is set, and not to 0."""
    return os.environ.get("EL4NER_DEBUG", "") not in ("", "0")


class El4nerError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(El4nerError):
    """The call or the command line is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting or a configuration file is wrong."""


class InputError(UsageError):
    """A whole input file cannot be read."""


class PoolError(InputError):
    """A labelled sentence of a pool is wrong."""


class LabelsError(InputError):
    """A label definition file is wrong."""


class EngineError(El4nerError):
    """A model cannot be loaded or run."""


class ModelNotFoundError(EngineError):
    """No model of that name, folder, file or URL is at hand."""

    exit_code = 2


class KernelError(El4nerError):
    """A compute kernel cannot run, or the backend asked for is not available."""


class ShapeError(KernelError, ValueError):
    """An array has the wrong shape or dtype."""

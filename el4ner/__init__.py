"""el4ner: entity recognition without training, by an ensemble of small open language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from el4ner.config import Config, load_config
    from el4ner.errors import El4nerError
    from el4ner.pipeline import El4ner
    from el4ner.records import Demonstration, Entity, Label, Prediction, Sentence, Span

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "Demonstration": "records",
    "El4ner": "pipeline",
    "El4nerError": "errors",
    "Entity": "records",
    "Label": "records",
    "Prediction": "records",
    "Sentence": "records",
    "Span": "records",
    "load_config": "config",
}

__all__ = [
    "Config",
    "Demonstration",
    "El4ner",
    "El4nerError",
    "Entity",
    "Label",
    "Prediction",
    "Sentence",
    "Span",
    "__version__",
    "load_config",
]


def __getattr__(name: str) -> Any:
    """Public names load when they are asked for, so that importing el4ner stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'el4ner' has no attribute {name!r}")
    return getattr(import_module(f"el4ner.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""PEFT adapters: another model over the same weights.

The modules of the base model are copied, its tensors are not; the adapter's layers go into the copy. So every model
answers by itself, the base as if there were no adapters, and memory holds the base once.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from dataclasses import dataclass
from typing import Any

from el4ner.errors import EngineError
from el4ner.models import ADAPTER_WEIGHTS, adapter_folder, folder_digest


@dataclass(frozen=True, slots=True)
class Adapter:
    """A folder with an adapter, as peft saves it. digest: SHA-256 of its content. parameters: its numbers in all."""

    folder: str
    digest: str
    parameters: int

    @property
    def source(self) -> str:
        """Name and content in one string, for reports and cache keys."""
        return f"{self.folder}@{self.digest[:16]}"


def find_adapter(folder: str) -> Adapter:
    """The adapter in a folder. Raises ModelNotFoundError if there is none, EngineError if it cannot be read."""
    from safetensors import safe_open

    path = adapter_folder(folder)
    try:
        with safe_open(path / ADAPTER_WEIGHTS, framework="numpy") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118  # no mapping
    except Exception as error:  # a damaged file fails in its own ways
        raise EngineError(f"adapter {folder!r} cannot be read: {first_line(error)}") from error
    return Adapter(str(path), folder_digest(path), sum(math.prod(shape) for shape in shapes))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def adapt(model: Any, adapter: Adapter) -> Any:
    """A model with the adapter's layers over the tensors of `model`, which stays as it is.

    Raises EngineError without peft, or for an adapter that does not fit the model, or does more than change its layers.
    """
    if importlib.util.find_spec("peft") is None:
        raise EngineError("members with an adapter need peft; pip install 'el4ner[adapters]'")
    import torch
    from peft import PeftModel

    tensors = [*model.parameters(), *model.buffers()]
    own = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    try:
        with warnings.catch_warnings():
            # a part of the adapter that the file does not have would be left at random
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            warnings.simplefilter("ignore", FutureWarning)  # peft reads names of transformers that will go
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # a warning to those who merge
            whole = PeftModel.from_pretrained(own, adapter.folder, autocast_adapter_dtype=False).eval()
        adapted = whole.get_base_model()
        ids = torch.arange(8, device=model.device)[None]
        with torch.inference_mode():
            complete = torch.allclose(whole(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-3)
    except Exception as error:  # whatever kind of adapter, model and file do not go together
        reason = first_line(error)
        raise EngineError(f"adapter {adapter.folder!r} does not fit {model.config.model_type}: {reason}") from error
    if not complete:
        raise EngineError(
            f"adapter {adapter.folder!r}: a {whole.peft_type} does more than change layers; use LoRA or its relatives"
        )
    adapted.requires_grad_(False)
    return adapted

"""The few loops that are worth a kernel. Each file: formula, reference, fast versions, public function.

Inputs are numpy arrays or torch tensors; results are numpy arrays. `available_backends(op)` says what can run here.
"""

from el4ner.kernels._dispatch import available_backends, operations
from el4ner.kernels._span_faiss import LARGE, SpanIndex
from el4ner.kernels._span_pool import SpanPool
from el4ner.kernels.choice_logprobs import choice_logprobs
from el4ner.kernels.span_scores import best_flat, span_scores
from el4ner.kernels.span_topk import span_recall, span_topk
from el4ner.kernels.vote import vote

__all__ = [
    "LARGE",
    "SpanIndex",
    "SpanPool",
    "available_backends",
    "best_flat",
    "choice_logprobs",
    "operations",
    "span_recall",
    "span_scores",
    "span_topk",
    "vote",
]

"""choice_logprobs as it is written by hand: all logits, then torch over them."""

from __future__ import annotations

from collections.abc import Iterator

from el4ner.bench.rivals import Rival, to_host
from el4ner.kernels._cases import Case


def rivals(case: Case, device: str) -> Iterator[Rival]:  # noqa: ARG001  the tensors are where they are
    """log_softmax and gather, in float32 and in the head's own dtype; gather minus logsumexp."""
    import torch

    hidden, head, ids = (case.inputs[name] for name in ("hidden", "head", "token_ids"))
    # Own dtype: the log-probability itself is rounded too, to 8 bits at values up to about 32.
    coarse = case.tolerance if head.dtype == torch.float32 else 0.15
    yield Rival(
        "torch log_softmax f32 + gather",
        lambda: to_host(torch.log_softmax(hidden @ head.T, 1, dtype=torch.float32).gather(1, ids)),
        case.tolerance,
        case.why,
    )
    yield Rival(
        "torch log_softmax + gather",
        lambda: to_host(torch.log_softmax(hidden @ head.T, 1).gather(1, ids).float()),
        coarse,
        "logits and result in the head's dtype",
    )

    def gather_minus_logsumexp() -> torch.Tensor:
        logits: torch.Tensor = hidden @ head.T
        return logits.gather(1, ids).float() - logits.logsumexp(1, keepdim=True).float()

    yield Rival(
        "torch gather - logsumexp",
        lambda: to_host(gather_minus_logsumexp()),
        coarse,
        "logits and their log-sum-exp in the head's dtype",
    )

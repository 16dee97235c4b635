"""choice_logprobs: hidden states -> log-probabilities of a few tokens, without a float32 [rows, vocabulary] array.

    logit[r, v] = cap(scale * (hidden[r] . head[v]) + bias[v])          cap(x) = soft_cap * tanh(x / soft_cap), if set
    "vocab":    out[r, c] = logit[r, id[r, c]] - log sum_v exp logit[r, v]
    "choices":  out[r, c] = logit[r, id[r, c]] - log sum_c' exp logit[r, id[r, c']]

The vocabulary is read in blocks with an online log-sum-exp (running maximum and sum); "choices" reads only the
columns that are asked for. Ids of -1 pad a row and give -inf. With a head in half precision the logits that are asked
for are exact float32 dots; those in the sum over the vocabulary are rounded to the head's dtype, like a model's own.
Source: Milakov and Gimelshein 2018, arXiv:1805.02867, for the online sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import ShapeError
from el4ner.kernels import _dispatch
from el4ner.kernels._dispatch import Array, njit, triton_jit
from el4ner.kernels._threads import thread_count

if TYPE_CHECKING:
    import torch
    import triton.language as tl

_Floats = NDArray[np.float32]
Normalise = Literal["vocab", "choices"]

# soft_cap and scale: what float32 divides and multiplies by without losing it.
_FACTORS = (1e-30, 1e30)
# Vocabulary rows per block: 64 rows of logits in float32 then take 2 MB, about a core's share of cache. Not tuned.
_BLOCK = 8192
# Rows, columns and dimensions of a block in triton; programs for each block of rows (an H100 runs 132 at a time).
# These compile without spilling for 9.0 and 8.0 (tests/test_triton_compile.py); not timed: no GPU was at hand.
_ROWS, _COLUMNS, _DEPTH, _SPLITS = 64, 128, 64, 132
_WARPS, _STAGES = 8, 4


class _Head:
    """hidden (R, H) and head (V, H) as tensors, and how logits follow from them."""

    def __init__(
        self, hidden: Array, head: Array, bias: Array | None, soft_cap: float | None, scale: float, device: str
    ) -> None:
        self.hidden = _tensor(hidden, device)
        self.head = _tensor(head, device)
        self.bias = None if bias is None else _tensor(bias, device)
        self.soft_cap = soft_cap
        self.scale = scale

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """(R, n) logits of some rows of the head. float64 multiplies in float64; else in the head's own dtype."""
        import torch

        head = self.head[rows]
        if dtype == torch.float64:
            hidden, head = hidden.to(dtype), head.to(dtype)
        out = (hidden.to(head.dtype) @ head.T).to(dtype) * self.scale
        return self.finish(out, rows)

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """(R, C) float32 logits of the tokens ids (R, C) >= 0, each row its own; products are exact in float32."""
        import torch

        columns, position = torch.unique(ids, return_inverse=True)
        few = self.head[columns].float()  # (n, H)
        if len(columns) <= 4 * ids.shape[1]:
            out = torch.gather(self.hidden.float() @ few.T, 1, position)
        else:  # rows share few tokens: a dot for each instead of a product of all with all
            out = torch.einsum("rh,rch->rc", self.hidden.float(), few[position])
        return self.finish(out * self.scale, ids)

    def finish(self, out: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Bias and soft cap."""
        if self.bias is not None:
            out = out + self.bias[rows].to(out.dtype)
        return out if self.soft_cap is None else self.soft_cap * (out / self.soft_cap).tanh()


def _tensor(array: Array, device: str) -> torch.Tensor:
    import torch

    if isinstance(array, torch.Tensor):
        return array.detach().to(device)
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def choice_logprobs_ref(head: _Head, ids: torch.Tensor, normalise: Normalise) -> torch.Tensor:
    """All logits in float64, then the formula."""
    import torch

    logits = head.logits(head.hidden, slice(None), torch.float64)  # (R, V)
    chosen = logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    return chosen - _number((logits if normalise == "vocab" else chosen).logsumexp(1, keepdim=True))


def _number(total: torch.Tensor) -> torch.Tensor:
    """NaN for an infinite sum: a logit of +inf would give every other token a log-probability of -inf, and no error."""
    import torch

    return total.masked_fill(total == torch.inf, torch.nan)


def _chosen(head: _Head, ids: torch.Tensor) -> torch.Tensor:
    import torch

    return head.at(ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)


def choice_logprobs_torch(head: _Head, ids: torch.Tensor, normalise: Normalise) -> torch.Tensor:
    """Blocks of the vocabulary, reduced by torch; any dtype, CPU and CUDA."""
    import torch

    chosen = _chosen(head, ids)
    if normalise == "choices":
        return chosen.log_softmax(1)
    total = torch.full((len(ids), 1), -torch.inf, device=ids.device)
    for start in range(0, len(head.head), _BLOCK):
        block = head.logits(head.hidden, slice(start, start + _BLOCK), torch.float32)
        total = torch.logaddexp(total, block.logsumexp(1, keepdim=True))
    return (chosen - _number(total)).clamp(max=0.0)


@njit
def _online(block: _Floats, top: NDArray[np.float64], total: NDArray[np.float64]) -> None:
    """Add a block of logits to each row's running maximum and sum of exp(logit - maximum)."""
    rows, columns = block.shape
    for r in range(rows):
        largest = top[r]
        for c in range(columns):
            largest = max(largest, block[r, c])
        if largest > top[r]:
            total[r] = total[r] * np.exp(top[r] - largest)
            top[r] = largest
        for c in range(columns):
            total[r] += np.exp(block[r, c] - largest)


def choice_logprobs_numba(head: _Head, ids: torch.Tensor, normalise: Normalise) -> torch.Tensor:
    """Blocks of the vocabulary: products by torch, the reduction compiled by numba, in float64."""
    import torch

    chosen = _chosen(head, ids)
    top, total = np.full(len(ids), -np.inf), np.zeros(len(ids))
    if normalise == "choices":
        _online(np.ascontiguousarray(chosen.numpy()), top, total)
    else:
        for start in range(0, len(head.head), _BLOCK):
            block = head.logits(head.hidden, slice(start, start + _BLOCK), torch.float32)
            _online(np.ascontiguousarray(block.numpy()), top, total)
    return (chosen - torch.from_numpy(top + np.log(total))[:, None]).clamp(max=0.0)


def choice_logprobs_native(head: _Head, ids: torch.Tensor, normalise: Normalise) -> torch.Tensor:
    """Product and log-sum-exp fused in C++ (csrc/choice_logprobs.hpp), with float32 logits whatever the dtype.

    Heads in float16 or float64 go through torch: there are no loops for them.
    """
    import torch

    from el4ner import _native

    bf16 = head.head.dtype == torch.bfloat16
    if normalise == "choices" or not (bf16 or head.head.dtype == torch.float32):
        return choice_logprobs_torch(head, ids, normalise)
    chosen = _chosen(head, ids)
    total = np.empty(len(ids), dtype=np.float64)
    bias = None if head.bias is None else head.bias.float().contiguous().numpy()
    hidden, weight = head.hidden.to(head.head.dtype).contiguous(), head.head.contiguous()
    options = (bias, head.scale, head.soft_cap or 0.0, total, thread_count())
    if bf16:  # numpy has no such type: its bits are passed
        bits, head_bits = hidden.view(torch.uint16).numpy(), weight.view(torch.uint16).numpy()
        _native.choice_log_totals_bf16(bits, head_bits, *options)
    else:
        _native.choice_log_totals_f32(hidden.numpy(), weight.numpy(), *options)
    return (chosen - torch.from_numpy(total)[:, None]).clamp(max=0.0)


@triton_jit
def _partial_kernel(  # type: ignore[no-untyped-def]  # descriptors, pointers and scalars, typed by triton
    hidden_descriptor,
    head_descriptor,
    bias_ptr,
    top_ptr,
    sum_ptr,
    rows,
    vocabulary,
    width,
    blocks_each,
    scale,
    soft_cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # One block of rows, one share of the vocabulary: its running maximum and sum of exponentials.
    row = tl.program_id(0) * BLOCK_R
    split = tl.program_id(1)
    top = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for block in range(split * blocks_each, (split + 1) * blocks_each):
        column = block * BLOCK_V + tl.arange(0, BLOCK_V)
        logit = tl.zeros((BLOCK_R, BLOCK_V), dtype=tl.float32)
        for h in range(0, width, BLOCK_H):
            states = hidden_descriptor.load([row, h])  # (BLOCK_R, BLOCK_H)
            part = head_descriptor.load([block * BLOCK_V, h])  # (BLOCK_V, BLOCK_H)
            logit = tl.dot(states, part.T, logit, input_precision="ieee")
        logit *= scale
        if HAS_BIAS:
            logit += tl.load(bias_ptr + column, mask=column < vocabulary, other=0.0)[None, :]
        if HAS_CAP:
            logit = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * logit / soft_cap) + 1.0))
        logit = tl.where(column[None, :] < vocabulary, logit, -float("inf"))
        largest = tl.maximum(top, tl.max(logit, axis=1))
        # -inf minus -inf would be NaN: as long as nothing is above -inf, sums stay 0
        base = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(logit - base[:, None]), axis=1)
        top = largest
    at = row + tl.arange(0, BLOCK_R)
    tl.store(top_ptr + split * rows + at, top, mask=at < rows)
    tl.store(sum_ptr + split * rows + at, total, mask=at < rows)


def choice_logprobs_triton(head: _Head, ids: torch.Tensor, normalise: Normalise) -> torch.Tensor:
    """Product and log-sum-exp fused; shares of the vocabulary are merged in a fixed order, so runs are repeatable."""
    import torch
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    chosen = _chosen(head, ids)
    if normalise == "choices":
        return chosen.log_softmax(1)
    dtype, (vocabulary, width) = head.head.dtype, head.head.shape
    stored = torch.float32 if _dispatch.interpreted() or dtype == torch.float64 else dtype
    # Rows of a descriptor begin at multiples of 16 bytes.
    padding = (0, -width % (16 // stored.itemsize))
    operands = (head.hidden.to(dtype), head.head)
    hidden, weight = (torch.nn.functional.pad(operand.to(stored), padding).contiguous() for operand in operands)
    blocks = triton.cdiv(vocabulary, _COLUMNS)
    splits = min(blocks, max(1, _SPLITS // triton.cdiv(len(ids), _ROWS)))
    blocks_each = triton.cdiv(blocks, splits)
    top, total = (torch.empty((splits, len(ids)), device=ids.device) for _ in range(2))
    bias = top if head.bias is None else head.bias.float().contiguous()
    kernel: Any = _partial_kernel
    kernel[(triton.cdiv(len(ids), _ROWS), splits)](
        TensorDescriptor.from_tensor(hidden, [_ROWS, _DEPTH]), TensorDescriptor.from_tensor(weight, [_COLUMNS, _DEPTH]),
        bias, top, total, len(ids), vocabulary, width, blocks_each, head.scale, head.soft_cap or 1.0,
        HAS_BIAS=head.bias is not None, HAS_CAP=head.soft_cap is not None,
        BLOCK_R=_ROWS, BLOCK_V=_COLUMNS, BLOCK_H=_DEPTH, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    sums = (top.double() + total.double().log()).logsumexp(0)  # (R,), in the order of the vocabulary
    return (chosen - sums[:, None]).clamp(max=0.0)


_dispatch.register(
    "choice_logprobs",
    ref=choice_logprobs_ref,
    torch=choice_logprobs_torch,
    numba=choice_logprobs_numba,
    native=choice_logprobs_native,
    triton=choice_logprobs_triton,
)


def choice_logprobs(
    hidden: Array,
    head: Array,
    token_ids: Array,
    normalise: Normalise = "vocab",
    *,
    bias: Array | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    n_vocab: int | None = None,
    backend: str = "auto",
) -> _Floats:
    """Log-probabilities of some tokens after each hidden state (the formula is at the top of this file).

    hidden (R, H), after the model's last norm; head (V, H), the output embedding (tied or not: it is only read); any
    float dtype, products are taken in the head's. token_ids (C,) i64 for all rows, or (R, C), -1 pads.
    bias (V,) or None; soft_cap > 0 or None and scale as in the model's configuration. n_vocab: the tokenizer's size,
    where the head was padded to more rows; rows from there on do not count.
    Returns (R, C) f32; -inf at padding. Raises ShapeError (a ValueError) on shapes that do not fit, ids outside the
    vocabulary, a row without any id, dtypes that are no floats, NaN or infinity in hidden, NaN or +inf in what is read
    of head and bias, logits that overflow the head's dtype (float32 at least); KernelError if the backend cannot run.

    >>> choice_logprobs(np.ones((1, 1)), np.array([[0.0], [0.0], [9.0]]), np.array([0, 1]), n_vocab=2).tolist()
    [[-0.6931471824645996, -0.6931471824645996]]
    """
    hidden, head = _floats("hidden", hidden), _floats("head", head)
    bias = None if bias is None else _floats("bias", bias)
    device = _dispatch.device_of(hidden, head)
    run = _dispatch.choose("choice_logprobs", backend, device)
    (rows, width), (vocabulary, head_width) = _two_axes("hidden", hidden), _two_axes("head", head)
    if width != head_width:
        raise ShapeError(f"hidden has shape ({rows}, {width}), head ({vocabulary}, {head_width}); H must be equal")
    if normalise not in ("vocab", "choices"):
        raise ShapeError(f"normalise={normalise!r}; allowed: vocab, choices")
    if bias is not None and tuple(bias.shape) != (vocabulary,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; ({vocabulary},) is needed")
    if n_vocab is not None:
        n_vocab = _dispatch.to_index("n_vocab", n_vocab)
        if not 0 < n_vocab <= vocabulary:
            raise ShapeError(f"n_vocab={n_vocab} with {vocabulary} rows of head; choose 1 to {vocabulary}, or None")
        head, bias, vocabulary = head[:n_vocab], None if bias is None else bias[:n_vocab], n_vocab
    least, most = _FACTORS
    if soft_cap is not None and not least <= soft_cap <= most:
        raise ShapeError(f"soft_cap={soft_cap}; it must be above 0 ({least} to {most}), or None for no cap")
    if not abs(scale) <= most:
        raise ShapeError(f"scale={scale}; a number of up to {most} is needed")
    ids = _ids(token_ids, rows, vocabulary)
    if not ids.size:
        return np.empty(ids.shape, dtype=np.float32)
    plan = _Head(hidden, head, bias, soft_cap, scale, device)
    if not bool(plan.hidden.isfinite().all()):
        raise ShapeError("hidden holds NaN or infinity; only finite numbers are allowed")
    out: torch.Tensor = run(plan, _tensor(ids, device), normalise)
    result: _Floats = out.float().cpu().numpy()
    if np.isnan(result).any():
        raise ShapeError(
            "head or bias holds NaN or +inf, a logit overflows the head's dtype, or a row's logits are all -inf; "
            "only numbers are allowed"
        )
    return result


def _floats(name: str, array: Any) -> Any:
    """The array or tensor itself, lists as an array. Raises ShapeError unless it holds real floating-point numbers."""
    if hasattr(array, "detach"):
        if not array.is_floating_point():
            raise ShapeError(f"{name} has dtype {array.dtype}; a float dtype is needed")
        return array
    array = np.asarray(array)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ShapeError(f"{name} has dtype {array.dtype}; a float dtype of up to 64 bits is needed")
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # torch takes no other order of bytes


def _two_axes(name: str, array: Any) -> tuple[int, int]:
    shape = tuple(getattr(array, "shape", ()))
    if len(shape) != 2:
        raise ShapeError(f"{name} has shape {shape}; 2 axes are needed")
    return shape


def _ids(token_ids: Array, rows: int, vocabulary: int) -> NDArray[np.int64]:
    ndim = getattr(token_ids, "ndim", np.ndim(token_ids))
    ids = _dispatch.to_numpy("token_ids", token_ids, 2 if ndim == 2 else 1, np.int64)
    if ids.ndim == 1:
        ids = np.repeat(ids[None], rows, axis=0)
    if len(ids) != rows:
        raise ShapeError(f"token_ids has {len(ids)} rows, hidden {rows}; they must be equal")
    if ids.size and (ids.min() < -1 or ids.max() >= vocabulary):
        wrong = ids.min() if ids.min() < -1 else ids.max()
        raise ShapeError(f"token id {wrong}; allowed: 0 to {vocabulary - 1}, and -1 as padding")
    if ids.size and (ids < 0).all(axis=1).any():
        raise ShapeError(
            f"row {int((ids < 0).all(axis=1).argmax())} of token_ids is all padding; ask for one id or more"
        )
    return ids

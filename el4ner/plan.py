"""Will the models fit? Weights, keys and values, and workspace of every model, predicted before any of them is loaded.

    resident:  sum of all weights and caches + the largest workspace + tables and what the process takes by itself
    by turns:  the largest single model instead of the sum

Members that share a source share its weights, and its cache unless their adapters differ. Prediction needs
configurations only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from el4ner.config import Config, MemberConfig
from el4ner.engines.adapters import find_adapter
from el4ner.engines.budgets import FORWARD_TOKENS, PREFIX_CACHE_BYTES, decode_replies, single_rows
from el4ner.engines.sizes import ModelSize, encoder_parameters, size_of
from el4ner.errors import ConfigError
from el4ner.labels import read_labels
from el4ner.models import resolve
from el4ner.pool import labels_file
from el4ner.prompts import instruction

MIB = 1 << 20

FIT_SHARE = 0.9
"""Share of the free memory that models may take: allocators lose some of it between blocks."""
LEAST_CACHE = 16 * MIB
"""Prefixes are kept in no less than this."""
LEAST_TOKENS = 64
"""Forward passes are no smaller than this."""
_WORD_BYTES = 2 << 10
"""What a word of the vocabulary takes in tables: 45 MiB of tokenizer and 53 of grammar with 49,152 words."""
_BYTES = ("weights", "cache", "tables", "workspace")


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One set of weights, with the adapters over it: who uses it, and the bytes it is predicted to take.

    cache: keys and values of prefixes that are kept. tables: of its words, in tokenizer and grammar; 0 on a GPU.
    workspace: keys and values of the batch that runs, copied side by side, with its states, masks and logits.
    """

    source: str
    members: tuple[str, ...]
    quantization: str
    parameters: int
    weights: int
    kv_per_token: int
    cache: int
    tables: int
    workspace: int

    @property
    def total(self) -> int:
        """Everything this model takes while it runs."""
        return self.weights + self.cache + self.tables + self.workspace


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is predicted to take on a device, in bytes.

    encoder: weights of the sentence encoder, which always stay. process: what Python and its libraries take on a CPU,
    measured now; 0 on a GPU. available: free memory of the device, or the limit that was given. mode: "resident",
    "turns" or "too large". cache_limit: what an engine may keep of prefixes. forward_tokens: padded new tokens of a
    forward pass; fewer than usual where a limit asks for it.
    """

    device: str
    dtype: str
    models: tuple[ModelPlan, ...]
    encoder: int
    process: int
    available: int | None
    limited: bool
    mode: str
    cache_limit: int
    forward_tokens: int

    @property
    def resident(self) -> int:
        """All models in memory at once; only one of them runs at a time."""
        models = sum(model.weights + model.cache for model in self.models)
        return self._fixed + models + max((model.workspace for model in self.models), default=0)

    @property
    def _fixed(self) -> int:
        return self.process + self.encoder + sum(model.tables for model in self.models)

    @property
    def turns(self) -> int:
        """One model in memory at a time; tables stay."""
        return self._fixed + max((model.total - model.tables for model in self.models), default=0)

    @property
    def predicted(self) -> int:
        """What the run will take as planned."""
        return self.resident if self.mode == "resident" else self.turns

    @property
    def models_limit(self) -> int | None:
        """Most that models in memory may take with their caches, None for all of them."""
        if self.mode == "resident" or self.available is None:
            return None
        others = self._fixed + max((model.workspace for model in self.models), default=0)
        return max(int(self.available * FIT_SHARE) - others, 1)

    @property
    def largest_cache(self) -> int:
        """Keys and values that one model keeps at most."""
        return max((model.cache for model in self.models), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, bytes as MiB, for JSON."""
        models = []
        for model in self.models:
            facts = {key: value for key, value in asdict(model).items() if key not in _BYTES}
            parts = {key: getattr(model, key) for key in (*_BYTES, "total")}
            models.append(facts | {f"{key}_mib": mib(value) for key, value in parts.items()})
        sizes = {
            "encoder": self.encoder, "process": self.process, "resident": self.resident, "turns": self.turns,
            "predicted": self.predicted, "available": self.available,
        }  # fmt: skip
        own = {f"{key}_mib": None if value is None else mib(value) for key, value in sizes.items()}
        facts = {
            "device": self.device, "dtype": self.dtype, "mode": self.mode, "forward_tokens": self.forward_tokens,
            "limited": self.limited,
        }  # fmt: skip
        return facts | {"models": models} | own


def mib(n_bytes: float) -> int:
    """Bytes as whole MiB."""
    return round(n_bytes / MIB)


def make_plan(config: Config, members: Sequence[MemberConfig] | None = None, process: int | None = None) -> Plan:
    """The plan of a run with these settings. Raises what resolving models and reading configurations raise.

    members: only these. process: bytes of the process without models, where they are known.
    """
    from el4ner.engines.loading import choose_device, choose_dtype

    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    groups: dict[tuple[str, str], list[MemberConfig]] = {}
    for member in config.members if members is None else members:
        if resolve(member.source).kind != "server":  # a server's memory is its own
            groups.setdefault((member.source, member.quantization), []).append(member)
    encoder = encoder_parameters(resolve(config.encoder)) * dtype.itemsize
    if device.type != "cpu":
        process = 0
    elif process is None:
        process = process_bytes() if groups else resident_bytes()
    sizes = [size_of(resolve(source)) for source, _ in groups]
    limit = None if config.memory_limit_mib is None else config.memory_limit_mib * MIB
    available = limit if limit is not None else free_bytes(str(device))
    if available is not None and limit is None and device.type == "cpu":
        available += process  # what is free beside what the process has already
    usual = PREFIX_CACHE_BYTES.get(device.type, 512 << 20), FORWARD_TOKENS.get(device.type, 512)
    for cache_limit, tokens in _smaller(*usual) if limit is not None else (usual,):
        models = tuple(
            plan_model(source, own, bits, size, config, device.type, dtype, cache_limit, tokens)
            for size, ((source, bits), own) in zip(sizes, groups.items(), strict=True)
        )
        plan = Plan(str(device), _name(dtype), models, encoder, process, available, limit is not None,
                    "resident", cache_limit, tokens)  # fmt: skip
        if available is None or plan.resident <= available * FIT_SHARE:
            return plan
        if plan.turns <= available * FIT_SHARE:
            return replace(plan, mode="turns")
    return replace(plan, mode="too large")


def _smaller(cache: int, tokens: int) -> Iterator[tuple[int, int]]:
    """What may be kept and run at once, ever less: the same steps under every limit, so that what fits under one fits
    under a higher one."""
    yield cache, tokens
    halved = 0
    while cache > LEAST_CACHE or tokens > LEAST_TOKENS:
        halved += 1
        cache = max(cache // 2, LEAST_CACHE)
        if halved % 2 == 0 or cache == LEAST_CACHE:
            tokens = max(tokens // 2, LEAST_TOKENS)
        yield cache, tokens


def plan_model(
    source: str,
    members: Sequence[MemberConfig],
    quantization: str,
    size: ModelSize,
    config: Config,
    device: str,
    dtype: Any,
    cache_limit: int,
    tokens: int,
) -> ModelPlan:
    """What one model takes, with the adapters of its members.

    cache: all that the engine keeps of prefixes, for the model and every adapter that is asked. workspace: a batch's
    prefixes copied side by side (half of that at most), 12 numbers of the widest layer and of the state for each token
    of a pass (`tokens`; in float32 on a CPU, where prompts are passes of their own, of the longest), its mask, and a
    row of float32 logits with its copy for every reply that is written at once.
    """
    per_token = size.kv_bytes_per_token(dtype)
    longest = config.max_prompt_tokens + instruction_tokens(config)
    longest = min(longest, size.positions or longest)
    adapters = dict.fromkeys(member.adapter for member in members)  # None: the model as it is
    added = sum(find_adapter(folder).parameters for folder in adapters if folder is not None)
    cache = cache_limit * len(adapters)
    replies = decode_replies(device, tokens)
    rows = min(config.batch_size, replies)
    # as many sentences at once as fit with half of what their replies may take; replies may take all of it
    written = config.extract.max_new_tokens * len(members)
    fitting = max(1, cache_limit // 2 // ((longest + written // 2) * per_token))
    copies = min(rows, fitting) * (longest + written) * per_token
    longest_pass = max(FORWARD_TOKENS[device], longest) if single_rows(device, _name(dtype)) else tokens
    states = longest_pass * (4 * size.widest + 8 * size.hidden) * dtype.itemsize
    mask = longest_pass * (longest + tokens) * 4
    logits = 2 * 4 * size.vocabulary * min(replies, rows * len(members))
    return ModelPlan(
        source, tuple(member.name for member in members), quantization, size.parameters + added,
        size.weight_bytes(dtype, quantization) + added * dtype.itemsize, per_token, cache,
        size.vocabulary * _WORD_BYTES if device == "cpu" else 0, copies + states + mask + logits,
    )  # fmt: skip


def _name(dtype: Any) -> str:
    """torch.float32 as float32."""
    return str(dtype).rpartition(".")[2]


def instruction_tokens(config: Config) -> int:
    """Tokens of the label definitions that a prompt begins with, at 4 characters a token; 0 for those of a pool."""
    file = labels_file(config.examples, config.labels)
    return 0 if file is None else len(instruction(read_labels(file))) // 4


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say (/proc)."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError, ImportError):
        return 0


def process_bytes() -> int:
    """Resident memory of this process with the libraries that models run on, which it loads now; 0 as above."""
    import llguidance
    import torch
    import transformers.modeling_utils

    _ = llguidance, torch, transformers.modeling_utils  # the last brings what models need, 190 MiB that come late else
    return resident_bytes()


def peak_mib(device: str) -> int:
    """Most memory so far: of a CUDA device what torch allocated there, else of this process.

    0 where the system does not say (Windows).
    """
    if device.startswith("cuda"):
        import torch

        return mib(torch.cuda.max_memory_allocated(device))
    import sys

    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def free_bytes(device: str) -> int | None:
    """Free memory of a device; of the CPU what the system calls available (Linux), None where it does not say.

    Within a control group, as containers are, no more than what its limit leaves.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min([int(line.split()[1]) * 1024, *_group_bytes()])
    except (OSError, ValueError, IndexError):
        return None
    return None


_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of the process's control group, as containers see them; versions 2 and 1."""


def _group_bytes(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the limit of the process's control group leaves; nothing where there is none. Caches of files count as
    free.
    """
    left = []
    for limit, use in _GROUPS:
        try:
            most, used = ((root / name).read_text(encoding="ascii").strip() for name in (limit, use))
            stat = (root / use).with_name("memory.stat").read_text(encoding="ascii").split()
            cached = dict(zip(stat[::2], stat[1::2], strict=False)).get("inactive_file", "0")
            if most != "max":
                left.append(max(0, int(most) - max(0, int(used) - int(cached))))
        except (OSError, ValueError):
            continue
    return left


def check_fits(plan: Plan) -> None:
    """Raises ConfigError for a plan whose largest model does not fit alone, where a limit was given."""
    if plan.mode == "too large" and plan.limited:
        largest = max(plan.models, key=lambda model: model.total, default=None)
        what = "the sentence encoder" if largest is None else largest.source
        raise ConfigError(
            f"memory_limit_mib={mib(plan.available or 0)}: with {what} alone a run takes about "
            f"{mib(plan.turns)} MiB and a tenth of the limit is kept free; raise the limit to "
            f"{mib(plan.turns / FIT_SHARE) + 1}, lower batch_size, or choose a smaller model or fewer bits"
        )


def render_plan(plan: Plan) -> str:
    """The plan as lines for reading."""
    lines = [f"{plan.device}, {plan.dtype}; MiB predicted from configurations, nothing was loaded", ""]
    lines.append(f"{'model':<36}{'weights':>9}{'cache':>8}{'tables':>8}{'work':>8}{'total':>8}  members")
    for model in plan.models:
        name = model.source if model.quantization == "none" else f"{model.source} ({model.quantization})"
        sizes = (model.cache, model.tables, model.workspace, model.total)
        columns = f"{mib(model.weights):>9}" + "".join(f"{mib(value):>8}" for value in sizes)
        lines.append(f"{name:<36}{columns}  {', '.join(model.members)}")
    lines.append(f"{'sentence encoder':<36}{mib(plan.encoder):>9}{'':>24}{mib(plan.encoder):>8}")
    if plan.process:
        lines.append(f"{'Python and libraries':<36}{'':>33}{mib(plan.process):>8}")
    lines.append("")
    there = "unknown" if plan.available is None else f"{mib(plan.available)} MiB"
    what = "limit" if plan.limited else "free"
    lines.append(
        f"all resident {mib(plan.resident)} MiB, by turns {mib(plan.turns)} MiB, {what} {there} (a tenth is kept free)"
    )
    verdict = {
        "resident": "all models stay in memory",
        "turns": "models take turns: each stage loads the next one",
        "too large": "the largest model does not fit: lower --batch-size, or choose a smaller model or fewer bits",
    }[plan.mode]
    if (
        plan.models
        and plan.mode != "too large"
        and plan.forward_tokens < FORWARD_TOKENS.get(plan.device.partition(":")[0], 512)
    ):
        if single_rows(plan.device, plan.dtype):
            verdict += f"; {decode_replies('cpu', plan.forward_tokens)} replies at once, since more do not fit"
        else:
            verdict += f"; {plan.forward_tokens} tokens a forward pass, since more do not fit"
    lines.append(verdict)
    return "\n".join(lines)

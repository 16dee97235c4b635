"""Local causal language models, run with transformers: hidden states, exact choice scores, greedy text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from el4ner.conversion import quiet_transformers
from el4ner.engines.base import Choose, Completion, FloatArray, Generate, Prompt, SubstringList, TokenStates
from el4ner.engines.batches import check_layers, even_batches, length_batches
from el4ner.engines.budgets import (
    FORWARD_TOKENS,
    PREFIX_CACHE_BYTES,
    READ_TOKENS,
    STEP_TOKENS,
    decode_replies,
    single_rows,
)
from el4ner.engines.chat import PromptRenderer, TokenIds
from el4ner.engines.counts import TokenCounts
from el4ner.engines.decoding import SETTLE_SHARE, BatchDecoder, PlainDecoder, Reply, ReplyWriter
from el4ner.engines.grammar import GrammarTokens, RowGrammar
from el4ner.engines.head import Head
from el4ner.engines.loading import LoadedModel, halving, load_model, numbers_of, one_at_a_time, run_errors
from el4ner.engines.packing import Packing, check
from el4ner.engines.prefix_cache import PrefixCache, PrefixRunner
from el4ner.engines.repeated import RepeatedCache
from el4ner.engines.residency import Residency
from el4ner.engines.scoring import Budgets, ChoiceScorer, PlainScorer, Question
from el4ner.engines.states import cut, find_blocks, read_batch, read_trie_ends, token_states
from el4ner.engines.token_trie import TokenTrie
from el4ner.engines.tokens import TextTokens
from el4ner.errors import EngineError

_READ_MULTIPLE = 16
"""On a CPU texts are read in batches of fixed shapes: rows padded to a multiple of this many tokens."""


class TransformersEngine:
    """A causal language model (implements `engines.base.Engine`).

    source: `embedded:NAME`, a model folder, a .gguf file or a Hugging Face id. Engines of one source, device and dtype
    share one model in memory, and its cache of prefixes. read_tokens, forward_tokens: padded tokens per forward pass of
    `read` and of everything else (defaults by device). In float32 on a CPU each prefix is a pass of its own, and so are
    the questions behind it, up to `budgets.FORWARD_TOKENS` of them: numbers do not depend on what is asked behind other
    prefixes, and forward_tokens bounds only how much is written at once.
    prefix_cache_bytes: memory for keys and values of prompt prefixes; the first engine of a model sets it.
    quantization: none, 8bit or 4bit. residency: the models that it takes turns with. adapter: the folder of a PEFT
    adapter over the source's weights. loaded: a model that is in memory already. counts: tokens asked, computed and
    written so far.
    Raises ModelNotFoundError or EngineError if the model cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        source: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        chat: bool = True,
        read_tokens: int | None = None,
        forward_tokens: int | None = None,
        prefix_cache_bytes: int | None = None,
        quantization: str = "none",
        residency: Residency | None = None,
        adapter: str | None = None,
        loaded: LoadedModel | None = None,
    ) -> None:
        self.name = name
        self._loaded = loaded or load_model(
            source, device, dtype, quantization=quantization, residency=residency, adapter=adapter
        )
        self.source = numbers_of(self._loaded.source, self._loaded.device, self._loaded.dtype)
        self.device = self._loaded.device
        self.dtype = self._loaded.dtype
        self._config = self.model.config.get_text_config()
        self._read_tokens = read_tokens or READ_TOKENS.get(self.device.type, 2048)
        usual = FORWARD_TOKENS.get(self.device.type, 512)
        self._forward_tokens = forward_tokens or usual
        self._single_rows = single_rows(self.device.type, str(self.dtype).removeprefix("torch."))
        self._pack_tokens = usual if self._single_rows else self._forward_tokens
        self._text = TextTokens(self.tokenizer)
        self._prompts = self._renderer(chat)
        limit = prefix_cache_bytes or PREFIX_CACHE_BYTES.get(self.device.type, 512 << 20)
        self._cache: PrefixCache = self._loaded.shared.setdefault("prefixes", PrefixCache(limit))
        self.counts = TokenCounts()
        self.computed: list[int] = []
        """Prompt tokens computed for each request of the last `choose` or `generate`; see `TokenCounts`."""

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._loaded.tokenizer

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus completion: the smaller of the model's positions and the tokenizer's limit."""
        positions = getattr(self._config, "max_position_embeddings", None)
        # tokenizers without a limit of their own say about 1e30
        limits = [int(limit) for limit in (positions, self.tokenizer.model_max_length) if limit and limit < 10**9]
        return min(limits) if limits else 2048

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self._config.num_hidden_layers)

    @property
    @one_at_a_time
    def packing(self) -> Packing:
        """Whether questions run packed behind cached prefixes, and if not why; found out once per model."""
        if "packing" not in self._loaded.shared:
            self._loaded.shared["packing"] = check(self.model, self.device, self.dtype)
        packing: Packing = self._loaded.shared["packing"]
        return packing

    @property
    def notes(self) -> list[str]:
        """What a run's report should say about how this model ran so far."""
        notes: list[str] = self._loaded.shared.setdefault("notes", [])
        return notes

    @one_at_a_time  # engines of one source share its tokenizer, which is told with every call what a special token is
    def _renderer(self, chat: bool) -> PromptRenderer:
        return PromptRenderer(self.tokenizer, self.name, chat)

    @one_at_a_time
    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each rendered prompt, chat template included."""
        return [self._prompts.render(prompt).length for prompt in prompts]

    @one_at_a_time
    def prompt_ids(self, prompt: Prompt) -> TokenIds:
        """The token ids that the model reads for a prompt, for those who run `.model` themselves."""
        return self._prompts.render(prompt).ids

    @one_at_a_time
    def choice_ids(self, choice: str) -> TokenIds:
        """The token ids of a choice behind a prompt."""
        return self._prompts.segment(choice)

    def forget_prefixes(self) -> None:
        """Drop all keys and values that are kept of earlier prompts."""
        self._cache.clear()

    @one_at_a_time
    def choose(self, requests: Sequence[Choose]) -> list[FloatArray]:
        """Log-probabilities (n_choices,) f32 of each request's choices.

        A choice is tokenised like a further segment. Requests that share leading segments share their computation,
        within a call and across calls; the same request twice is answered once. Raises EngineError for a prompt that is
        too long or a choice without tokens.
        """
        asked = [self._question(request) for request in requests]
        questions = list(dict.fromkeys(asked))  # what is asked twice must not make a pass another
        lengths = [question.prompt.length + max(map(len, question.choices), default=0) for question in questions]
        self._check_lengths(lengths)
        packed, plain = self._split(lengths)
        answers = [np.zeros(0, dtype=np.float32)] * len(questions)
        computed = [0] * len(questions)
        with run_errors(self.name):
            for own, answer in ((packed, self._choose_packed), (plain, self._choose_plain)):
                if own:
                    for index, scores, tokens in zip(own, *answer([questions[i] for i in own]), strict=True):
                        answers[index], computed[index] = scores, tokens
        answered = dict(zip(questions, answers, strict=True))
        first = dict(zip(questions, computed, strict=True))
        self.computed = [first.pop(question, 0) for question in asked]
        self.counts.add(sum(question.prompt.length for question in asked), sum(self.computed))
        return [answered[question].copy() for question in asked]

    def _choose_packed(self, questions: Sequence[Question]) -> tuple[list[FloatArray], list[int]]:
        """Scores, and prompt tokens computed; with smaller passes where memory does not suffice."""

        def attempt(tokens: int) -> tuple[list[FloatArray], list[int]]:
            budgets = self._budgets(tokens, self._pack_tokens)
            runner = self._runner(budgets)
            scorer = ChoiceScorer(runner, Head(self.model), self._end_tokens(), budgets)
            scores = scorer.score(questions)
            self.counts.ran(runner.computed, runner.padded)
            return scores, scorer.computed

        (result, fitting), most = halving(attempt, self._pack_tokens, self.forget_prefixes), self._pack_tokens
        if fitting != most:
            self._note_halved(most, fitting)
            self._pack_tokens = fitting
            if not self._single_rows:
                self._forward_tokens = fitting
        return result

    def _choose_plain(self, questions: Sequence[Question]) -> tuple[list[FloatArray], list[int]]:
        scorer = PlainScorer(self._repeated(), self._end_tokens())
        scores = scorer.score(questions)
        self.counts.ran(scorer.run_tokens, scorer.run_tokens)
        return scores, scorer.computed

    def _split(self, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
        """Indices of what may be packed and of what may not; the latter is noted for the report."""
        packed = [index for index, length in enumerate(lengths) if self.packing.allows(length)]
        plain = sorted(set(range(len(lengths))) - set(packed))
        note = f"{self._loaded.source}: {self.packing}; what cannot be packed repeats the cache of its prefix"
        if plain and note not in self.notes:
            self.notes.append(note)
        return packed, plain

    def _note_halved(self, most: int, fitting: int) -> None:
        self.notes.append(
            f"{self._loaded.source}: out of memory with {most} tokens a forward pass, goes on with {fitting}"
        )

    def _repeated(self) -> RepeatedCache:
        """Prefixes kept by the model's own cache, which is copied for each continuation."""
        if "repeated" not in self._loaded.shared:
            with quiet_transformers():  # architectures without fast kernels say so
                self._loaded.shared["repeated"] = RepeatedCache(self.model, self.device, self.dtype)
        repeated: RepeatedCache = self._loaded.shared["repeated"]
        return repeated

    @one_at_a_time
    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """Greedy replies: the first line that is not blank, up to its break, the end of the turn or the token limit.

        The latter is `truncated`. A list also ends where it goes round in circles (`SubstringList.before_a_loop`).

        Raises EngineError for a prompt that is too long or a grammar that cannot be built.
        """
        distinct = dict.fromkeys(requests)  # members of one model may ask the same
        replies = [
            Reply(self._prompts.render(request.prompt), request.max_new_tokens, self._grammar(request.grammar))
            for request in distinct
        ]
        lengths = [reply.prompt.length + reply.limit for reply in replies]
        self._check_lengths(lengths)
        for reply in replies:
            reply.done = reply.truncated = reply.limit < 1
        writer = ReplyWriter(self.tokenizer, self._end_tokens())
        pairs = [(reply, length) for reply, length in zip(replies, lengths, strict=True) if not reply.done]
        packed, plain = self._split([length for _, length in pairs])
        with run_errors(self.name):
            if packed:
                self._write_packed([pairs[i][0] for i in packed], writer)
            if plain:
                decoder = PlainDecoder(self._repeated(), writer)
                decoder.write([pairs[i][0] for i in plain])
                self.counts.ran(decoder.run_tokens, decoder.run_tokens)
        written = {
            request: Completion(reply.text, reply.prompt.length, reply.generated, reply.truncated)
            for request, reply in zip(distinct, replies, strict=True)
        }
        first = dict(zip(distinct, (reply.computed for reply in replies), strict=True))
        self.computed = [first.pop(request, 0) for request in requests]
        self.counts.add(
            sum(written[request].prompt_tokens for request in requests), sum(self.computed),
            sum(reply.generated for reply in replies),
        )  # fmt: skip
        return [written[request] for request in requests]

    def _write_packed(self, replies: Sequence[Reply], writer: ReplyWriter) -> None:
        """Replies side by side; with fewer and smaller passes where memory does not suffice."""
        most = self._forward_tokens
        at_once = decode_replies(self.device.type, most)

        def attempt(tokens: int) -> None:
            budgets = self._budgets(tokens, most)
            runner = self._runner(budgets)
            going = [reply for reply in replies if not reply.done]
            for reply in going:
                reply.restart()
            decoder = BatchDecoder(
                runner, Head(self.model), writer, budgets, max(1, at_once * tokens // most),
                STEP_TOKENS.get(self.device.type, 1), margin_per_norm=self._margin_per_norm(),
            )  # fmt: skip
            decoder.write(going)
            self.counts.ran(runner.computed - decoder.settled, runner.padded - decoder.settled)

        _, fitting = halving(attempt, most, self.forget_prefixes)
        if fitting != most:
            self._note_halved(most, fitting)
            self._forward_tokens = fitting
            if not self._single_rows:  # questions have passes of their own there, and stay as they are
                self._pack_tokens = fitting

    def _margin_per_norm(self) -> float:
        """How near two tokens' logits must be, per unit of the hidden state's norm, to be settled by a pass alone."""
        if not self._single_rows:
            return 0.0
        if "widest" not in self._loaded.shared:
            self._loaded.shared["widest"] = Head(self.model).widest()
        return SETTLE_SHARE * float(self._loaded.shared["widest"])

    def _grammar(self, grammar: SubstringList | None) -> RowGrammar | None:
        if grammar is None:
            return None
        shared = self._loaded.shared
        if "grammar" not in shared:
            width = int(self.model.get_output_embeddings().weight.shape[0])
            shared["grammar"] = GrammarTokens(self.tokenizer, width, self._end_tokens())
        tokens: GrammarTokens = shared["grammar"]
        return tokens.matcher(grammar, leading_space=not self._prompts.templated)

    def _question(self, request: Choose) -> Question:
        choices = tuple(self._prompts.segment(choice) for choice in request.choices)
        for text, ids in zip(request.choices, choices, strict=True):
            if not ids:
                raise EngineError(f"choice {text!r} has no tokens; every choice must be non-empty text")
        if request.normalise not in ("vocab", "choices"):
            raise EngineError(f"normalise={request.normalise!r} is unknown; choose 'vocab' or 'choices'")
        return Question(self._prompts.render(request.prompt), choices, request.normalise == "choices")

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        for length in lengths:
            if length > self.max_tokens:
                raise EngineError(
                    f"engine {self.name!r}: a prompt takes {length} tokens with its answer, the model takes "
                    f"{self.max_tokens}; use fewer demonstrations or shorter texts"
                )

    def _end_tokens(self) -> tuple[int, ...]:
        """Ids that end a turn: what the generation settings, the configuration and the tokenizer name."""
        named = [getattr(self.model.generation_config, "eos_token_id", None), self._config.eos_token_id]
        ids = [i for value in named for i in (value if isinstance(value, list) else [value]) if i is not None]
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return tuple(sorted(set(ids)))

    def _runner(self, budgets: Budgets) -> PrefixRunner:
        return PrefixRunner(
            self.model.base_model, self.device, self.dtype, self._cache, budgets.forward_tokens, budgets.kv_bytes,
            ragged=self.packing.ragged, single_rows=self._single_rows,
        )  # fmt: skip

    @property
    def prefix_tokens(self) -> int:
        """How many tokens of prefixes are kept at most."""
        return self._cache.limit_bytes // self._kv_bytes_per_token()

    def _kv_bytes_per_token(self) -> int:
        config = self._config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * self.n_layers * int(heads) * int(width) * self.dtype.itemsize

    def _budgets(self, tokens: int, most: int) -> Budgets:
        """Of passes of so many tokens, where `most` are usual."""
        kv_bytes = max(1, self._cache.limit_bytes // 2) * tokens // most
        return Budgets(tokens, tokens, kv_bytes, self._kv_bytes_per_token())

    @one_at_a_time
    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        """Hidden states of plain texts, without template or special tokens, in float32.

        Layer n is the output of the n-th block, before the final norm also for the last one. The forward pass ends at
        the deepest layer asked for. Texts longer than `max_tokens` are cut and `truncated_at` says where.
        """
        wanted = check_layers(layers, self.n_layers)
        backbone = self.model.base_model
        blocks = find_blocks(backbone)
        rows, frames = [], []
        for ids, offsets in self._text.with_offsets(texts):
            kept, kept_offsets, truncated_at = cut(ids, offsets, self.max_tokens)
            rows.append(kept)
            frames.append((kept_offsets, truncated_at))
        empty = {layer: np.zeros((0, self._config.hidden_size), dtype=np.float32) for layer in wanted}
        results = [TokenStates(offsets, dict(empty), None) for offsets, _ in frames]
        for batch, shape in self._read_batches([len(row) for row in rows]):
            with run_errors(self.name):
                chosen = [rows[index] for index in batch]
                states = read_batch(backbone, blocks, chosen, wanted, self.device, shape=shape)
            for index, found in zip(batch, states, strict=True):
                results[index] = token_states(frames[index][0], found, frames[index][1])
        return results

    @one_at_a_time
    def read_ends(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> list[FloatArray]:
        """Hidden states (n_layers, D) f32 of every prompt's last token, layers ascending; as `read`, but several
        segments to a text.

        Prompts with the same first segment are run as one trie, so that what they share is read once. Raises
        EngineError for a prompt that has no token, or more than `max_tokens`.
        """
        wanted = check_layers(layers, self.n_layers)
        rows = [tuple(i for segment in prompt for i in self._prompts.segment(segment)) for prompt in prompts]
        self._check_lengths([len(row) for row in rows])
        if not all(rows):
            raise EngineError("a prompt without any text has no last token; give it at least one non-empty segment")
        backbone, blocks = self.model.base_model, find_blocks(self.model.base_model)
        results: list[FloatArray] = [np.zeros((0, 0), dtype=np.float32)] * len(prompts)
        packed = [i for i, row in enumerate(rows) if self.packing.allows(len(row))]
        with run_errors(self.name):
            groups = self._end_groups(packed, prompts, rows)
            for batch, shape in self._read_batches([len(trie) for trie, _ in groups]):
                tries, ends = [groups[i][0] for i in batch], [groups[i][1] for i in batch]
                nodes = [list(own.values()) for own in ends]
                found = read_trie_ends(backbone, blocks, tries, nodes, wanted, self.device, self.dtype, shape)
                for own, states in zip(ends, found, strict=True):
                    for index, state in zip(own, states, strict=True):
                        results[index] = state
            for index in sorted(set(range(len(rows))) - set(packed)):
                (alone,) = read_batch(backbone, blocks, [rows[index]], wanted, self.device)
                results[index] = np.stack([alone[layer][-1] for layer in wanted])
        return results

    def _end_groups(
        self, chosen: Sequence[int], prompts: Sequence[Prompt], rows: Sequence[TokenIds]
    ) -> list[tuple[TokenTrie, dict[int, int]]]:
        """Tries of prompts with the same first segment, and in each by prompt the node where it ends.

        A trie holds no more nodes than one of questions, unless one prompt does.
        """
        groups: list[tuple[TokenTrie, dict[int, int]]] = []
        latest: dict[str, int] = {}
        for index in chosen:
            place = latest.get(prompts[index][0])
            if place is None or len(groups[place][0]) + groups[place][0].missing(rows[index]) > self._pack_tokens:
                place = latest[prompts[index][0]] = len(groups)
                groups.append((TokenTrie(), {}))
            trie, ends = groups[place]
            ends[index] = trie.insert(rows[index])
        return groups

    def _read_batches(self, lengths: list[int]) -> list[tuple[list[int], tuple[int, int] | None]]:
        """Indices of texts read together, and the shape to pad them to."""
        if self.device.type != "cpu":
            return [(batch, None) for batch in length_batches(lengths, self._read_tokens)]
        even = even_batches(lengths, _READ_MULTIPLE, self._read_tokens)
        # beyond the model's positions there is nothing to pad; of a trie more nodes than positions may be needed
        return [
            (batch, (rows, max(min(tokens, self.max_tokens), *(lengths[i] for i in batch))))
            for batch, rows, tokens in even
        ]

"""The same method by a plain script: transformers, one prompt at a time, nothing shared.

`PlainModel` answers what the stages ask (`engines.base.Engine`) the way one writes it down: every prompt is read whole,
every choice of several tokens is another prompt, every reply is written alone with the model's own cache, every text is
read alone through all layers. It uses the model, the tokenizer and llguidance; prompts, grammars and stages are
el4ner's, so that both sides ask the same. The sentence encoder is shared with the side it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from el4ner.engines.base import Choose, Completion, FloatArray, Generate, Prompt, SubstringList, TokenStates
from el4ner.engines.grammar import substring_list_grammar
from el4ner.errors import EngineError


class PlainModel:
    """A causal model asked plainly. source: what the other side calls it, since what was fitted is kept by it.

    run_tokens: tokens that went through the model. There is no chat template here: prompts are plain text.
    """

    def __init__(self, model: Any, tokenizer: Any, source: str, *, name: str = "plain") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.name = name
        self.run_tokens = 0
        self._device = next(model.parameters()).device
        self._guide: Any = None

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus completion: the smaller of the model's positions and the tokenizer's limit."""
        limits = [int(self.model.config.max_position_embeddings)]
        if self.tokenizer.model_max_length < 10**9:
            limits.append(int(self.tokenizer.model_max_length))
        return min(limits)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.model.config.num_hidden_layers)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return found

    def _prompt(self, prompt: Prompt) -> list[int]:
        start: list[int] = self.tokenizer("", add_special_tokens=True)["input_ids"]
        return start + [token for segment in prompt for token in self._ids(segment)]

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt."""
        return [len(self._prompt(prompt)) for prompt in prompts]

    def _forward(self, ids: Sequence[int], **keywords: Any) -> Any:
        self.run_tokens += len(ids)
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(ids)], device=self._device), **keywords)

    # Choices

    def choose(self, requests: Sequence[Choose]) -> list[FloatArray]:
        """Log-probabilities of each request's choices; one forward pass for each distinct prompt and choice."""
        return [self._choose(request) for request in requests]

    def _choose(self, request: Choose) -> FloatArray:
        prompt = self._prompt(request.prompt)
        choices = [tuple(self._ids(choice)) for choice in request.choices]
        if not all(choices):
            raise EngineError("a choice has no tokens; every choice must be non-empty text")
        logits: dict[tuple[int, ...], torch.Tensor] = {}  # what has been written of a choice -> logits (V) of the next
        for choice in sorted(choices, key=len, reverse=True):
            # where a choice ends and another goes on, that it ends there has a probability too
            written = choice if any(other[: len(choice)] == choice != other for other in choices) else choice[:-1]
            if written not in logits:
                rows = self._forward(prompt + list(written), use_cache=False).logits[0, len(prompt) - 1 :].float()
                logits |= {written[:n]: row for n, row in enumerate(rows)}
        if request.normalise == "vocab":
            scores = [
                sum(float(logits[choice[:n]].log_softmax(-1)[token]) for n, token in enumerate(choice))
                for choice in choices
            ]
        else:
            scores = [self._among(choice, choices, logits) for choice in choices]
        return np.array(scores, dtype=np.float32)

    def _among(
        self, choice: tuple[int, ...], choices: Sequence[tuple[int, ...]], logits: dict[tuple[int, ...], torch.Tensor]
    ) -> float:
        """Log-probability of a choice where at every step only the choices can go on."""
        score = 0.0
        for n in range(len(choice) + 1):
            written = choice[:n]
            nexts = sorted({other[n] for other in choices if len(other) > n and other[:n] == written})
            if not nexts:  # the choice is complete and no other goes on
                break
            row = logits[written].double()
            ways = {token: float(row[token]) for token in nexts}
            if written in choices:
                ways[-1] = float(row[self._ends()].logsumexp(0))
            taken = ways[choice[n] if n < len(choice) else -1]
            score += taken - float(torch.tensor(list(ways.values()), dtype=torch.float64).logsumexp(0))
        return score - float(np.log(choices.count(choice)))

    def _ends(self) -> list[int]:
        named = [self.model.generation_config.eos_token_id, self.model.config.eos_token_id, self.tokenizer.eos_token_id]
        return sorted({i for value in named for i in (value if isinstance(value, list) else [value]) if i is not None})

    # Replies

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """Greedy replies, each alone: the first line that is not blank; a list ends where it goes round in circles."""
        return [self._generate(request) for request in requests]

    def _generate(self, request: Generate) -> Completion:
        prompt = self._prompt(request.prompt)
        guide = self._matcher(request.grammar) if request.grammar is not None else None
        stops = {*self._ends(), *self.tokenizer.all_special_ids}
        written: list[int] = []
        fed, past, text, generated = prompt, None, "", 0
        while generated < request.max_new_tokens:
            output = self._forward(fed, past_key_values=past, use_cache=True)
            past = output.past_key_values
            row = output.logits[0, -1].float()
            if guide is not None:
                row = row.masked_fill(~self._allowed(guide, len(row)).to(row.device), float("-inf"))
            token = int(row.argmax())
            generated += 1
            if token in stops:
                return Completion(text, len(prompt), generated)
            written.append(token)
            fed = [token]
            text = self.tokenizer.decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            while "\n" in text and not text.partition("\n")[0].strip():
                text = text.partition("\n")[2]
            if guide is not None:
                guide.consume_token(token)
            if "\n" in text or (guide is not None and guide.is_stopped()):
                return Completion(text.partition("\n")[0], len(prompt), generated)
            listed = None if request.grammar is None else request.grammar.before_a_loop(text)
            if listed is not None:
                return Completion(listed, len(prompt), generated)
        return Completion(text, len(prompt), generated, truncated=True)

    def _matcher(self, grammar: SubstringList) -> Any:
        import llguidance
        import llguidance.hf

        if self._guide is None:
            size = int(self.model.get_output_embeddings().weight.shape[0])
            self._guide = llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=size, eos_token=self._ends())
        return llguidance.LLMatcher(self._guide, substring_list_grammar(grammar, leading_space=True), log_level=0)

    def _allowed(self, guide: Any, size: int) -> torch.Tensor:
        import llguidance.numpy

        mask = llguidance.numpy.allocate_token_bitmask(1, size)
        llguidance.numpy.fill_next_token_bitmask(guide, mask, 0)
        return torch.from_numpy(np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool))

    # Hidden states

    def read_ends(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> list[FloatArray]:
        """States of the last token of each prompt, by a pass of its own through the whole model."""
        found = []
        for prompt in prompts:
            ids = [
                i
                for segment in prompt
                for i in self.tokenizer(segment, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ]
            hidden = self._forward(ids, output_hidden_states=True, use_cache=False).hidden_states
            found.append(np.stack([hidden[layer][0, -1].float().cpu().numpy() for layer in sorted(set(layers))]))
        return found

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        """Hidden states of each text alone, by a pass through the whole model. Layers up to the last but one."""
        found = []
        for text in texts:
            encoded = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            ids = encoded["input_ids"]
            offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
            if not ids:
                width = int(self.model.config.hidden_size)
                states = {layer: np.zeros((0, width), dtype=np.float32) for layer in layers}
                found.append(TokenStates(offsets, states))
                continue
            hidden = self._forward(ids, output_hidden_states=True, use_cache=False).hidden_states
            states = {layer: hidden[layer][0].float().cpu().numpy() for layer in layers}
            covers = offsets[:, 1] > offsets[:, 0]
            found.append(TokenStates(offsets[covers], {layer: own[covers] for layer, own in states.items()}))
        return found

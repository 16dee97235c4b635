"""Which pool sentences are left out together: those that seem to come from one document.

Sentences of one document repeat its names. Where one of them is judged by a fit that has seen the others, it looks
easier than a sentence of a new text is: thresholds come out too low and scores too high. Documents are not marked in a
pool, so sentences that share an entity's string which few others have are taken for neighbours.

On CrossNER AI (100 pool sentences, one read-out, threshold 0.15) F1 out of fold was 0.640 with folds by hash and 0.624
with these, where 200 dev sentences had 0.620; of scores from 0.5 on 0.746 and 0.735 were right, on dev 0.716.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from el4ner.records import Demonstration

FOLDS_VERSION = 2
"""Part of what is cached about a pool; raised whenever the same sentences would get other folds."""

_RARE = 8
"""A string of more sentences than this says little about where they come from."""


def folds_of(sentences: Sequence[Demonstration], n_folds: int) -> tuple[int, ...]:
    """The fold of each sentence, 0 to n_folds - 1; the same for the same sentences in any order.

    Sentences with the same text, whatever its case or spacing, share a fold. So do sentences that share a rare entity
    string, rarest first, as long as a group stays under a fourth of a fold. Folds get about the same size.
    """
    keys = [_key(d.text) for d in sentences]
    groups = _Groups(keys)
    sharing: dict[str, set[str]] = defaultdict(set)
    for d, key in zip(sentences, keys, strict=True):
        for entity in d.entities:
            sharing[" ".join(d.text[entity.start : entity.end].casefold().split())].add(key)
    largest = max(2, len(sentences) // (4 * n_folds))
    rare = [(len(own), string) for string, own in sharing.items() if 1 < len(own) <= _RARE]
    for _, string in sorted(rare):
        first, *others = sorted(sharing[string])
        for other in others:
            groups.join(first, other, largest)
    sizes = [0] * n_folds
    fold_of: dict[str, int] = {}
    for root, size in sorted(groups.roots().items(), key=lambda item: (-item[1], item[0])):
        fold_of[root] = min(range(n_folds), key=lambda fold: (sizes[fold], fold))
        sizes[fold_of[root]] += size
    return tuple(fold_of[groups.root(key)] for key in keys)


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()


class _Groups:
    """Disjoint sets of keys with sizes; a set is named by the least of its keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._parent = {key: key for key in keys}
        self._size = Counter(keys)

    def root(self, key: str) -> str:
        """The name of a key's set."""
        while self._parent[key] != key:
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def join(self, one: str, other: str, largest: int) -> None:
        """Unites the sets of two keys unless the union would be larger than `largest`."""
        kept, merged = sorted((self.root(one), self.root(other)))
        if kept != merged and self._size[kept] + self._size[merged] <= largest:
            self._parent[merged] = kept
            self._size[kept] += self._size.pop(merged)

    def roots(self) -> dict[str, int]:
        """Size of every set, by name."""
        return dict(self._size)

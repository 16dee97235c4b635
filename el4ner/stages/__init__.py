"""The four stages, in order: retrieve, extract, classify, verify.

Each takes the sentences of a chunk, what the stages before it found, and the team that is asked; each returns a frozen
result with one entry per sentence. A stage decides what is asked and what an answer means.
"""

from el4ner.stages.classify import Classified, Scored, classify
from el4ner.stages.extract import Extracted, extract
from el4ner.stages.retrieve import Retrieved, Retriever, retrieve
from el4ner.stages.verify import Verified, verify

__all__ = [
    "Classified",
    "Extracted",
    "Retrieved",
    "Retriever",
    "Scored",
    "Verified",
    "classify",
    "extract",
    "retrieve",
    "verify",
]

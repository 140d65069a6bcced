"""Long-context suites, made by seed at any length in the model's own tokens. A new one is a file and a line here."""

from compress.evaluate.suites import associative, copying, longeval, needles, questions, tracking, words
from compress.evaluate.suites.suite import SUITES

__all__ = ["SUITES", "associative", "copying", "longeval", "needles", "questions", "tracking", "words"]

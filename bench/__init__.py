"""Measurements: el4ner-bench. What is timed is checked first, and every row says where it was measured."""

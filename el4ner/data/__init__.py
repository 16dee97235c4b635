"""The built-in pool (`pool.jsonl`) and its labels (`labels.yaml`), as data files; README.md holds the rules."""

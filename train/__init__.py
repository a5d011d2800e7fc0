"""Pocket Colossus: data-parallel LLM training whose result does not depend on how many ranks there were."""

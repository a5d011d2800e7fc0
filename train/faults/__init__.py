"""Faults on order: which, when and where; and how they strike."""

"""Breaks a run on purpose, and proves from its histories that nothing was lost."""

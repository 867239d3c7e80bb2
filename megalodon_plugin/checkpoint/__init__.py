"""State dicts in other formats: functions from state dict to state dict. No host."""

from .formats.authors_names import from_authors, to_authors

__all__ = ["from_authors", "to_authors"]

"""The report of a run: its table, its page."""

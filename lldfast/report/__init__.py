"""What a run came to: its table (summary.py) and its page (page.py), both from what the run folder holds."""

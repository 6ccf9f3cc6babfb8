"""What a run came to, from what its folder holds: a table (summary.py) and a page (page.py).

reading.py reads the folder for the page, sections.py and figures.py make its parts, style.py and html.py how they look.
"""

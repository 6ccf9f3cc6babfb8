"""One run of `lldfast train`, on disk and in memory.

config.py (with distill.py and methods.py) says what to run, read by parsing.py, folder.py where its files are, place.py on what
it computes; experiment.py opens what its methods share, plan.py says on which weights each trains, optimizer.py how it steps. Of
what is written, checkpoint.py has the state to resume from, log.py and measurements.py the way, record.py the results.
"""

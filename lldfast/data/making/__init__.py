"""From texts with a domain label to token shards and an evaluation corpus.

prepare.py makes and verifies a data folder; options.py says what can be chosen; sources.py reads the inputs, builtin.py the text
that is on every machine; evalplan.py chooses the evaluation texts, encode.py makes tokens of the rest.
"""

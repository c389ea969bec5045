"""What every benchmark runs on: a clock, the contest of a row's peers, results and their tables.

It knows no peer but by name.
"""

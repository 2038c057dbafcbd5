"""python -m nemo_trd.report: one HTML page of what became of runs, from their records.

Here: figures, tables, plots, marked samples, the page. May import records, prefix_failure's words.
Reads only; whatever the records hold is escaped.
"""

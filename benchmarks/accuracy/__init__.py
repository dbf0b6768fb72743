"""The accuracy study: `python -m benchmarks.accuracy`, what six bits cost in quality, measured on models that run anywhere.

settings   the rows: a format, a group size and an algorithm each
grids      integers and powers, to compare formats with
compress   one row's weights                          <- start here
subjects   the models, and how each is measured
study      the loop over rows
rows       results in a file that survives a kill
report     results as a table and as a picture
"""

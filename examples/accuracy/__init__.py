"""What six bits cost in quality: the paper's claim measured on models that run anywhere.

python -m examples.accuracy

settings   the rows: format, group, algorithm
compress   one row's weights                          <- start here
subjects   what is measured, as an interface
language   ... the code model, and any causal model
encoder    ... a pretrained sentence encoder
corpus     texts that every Python carries
metrics    divergence, ranks, bootstrap, what parses
study      the loop over rows
rows       results that survive a kill
table      ... for people
plots      ... as pictures
"""

"""How a result is shown.

text       plain text; the sentences that the others use, too
terminal   for rich
page       one HTML page, with the style of page.css
"""

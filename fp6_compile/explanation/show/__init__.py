"""How an explanation looks: as text, on a terminal, as a page."""

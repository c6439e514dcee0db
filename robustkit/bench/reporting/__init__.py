"""How a run is shown: on the terminal, as a page, in a notebook, to other programs. Nothing here computes a number."""

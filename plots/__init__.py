"""The paper's figures, from published numbers, recorded results and theory: `python -m plots`.

A figure is a module with `draw()`, which returns a `matplotlib.figure.Figure`; `plots.__main__` lists them.
"""

"""Who takes part: every way to compute a layer with an adapter, from the same weights.

Also the rows and the models in which they meet. They stand on `harness`.
"""

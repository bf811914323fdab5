"""The one sparse-gating core: G(x) = P(N(XW))."""

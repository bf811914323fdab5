"""One network over an image too big for memory, exactly, forward and backward."""

"""Class-sharded margin heads: the gate applied to classes."""

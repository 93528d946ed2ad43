"""The zoo: tiny models of every family in transformers, each one masked, narrowed both ways, and compared."""

"""A run over a data set: its settings, the pinned state, the pipeline, and shards."""

"""A run over a data set: what is asked for, what is pinned, the pipeline, and shards."""

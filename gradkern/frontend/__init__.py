"""From a live module to a Program: export, tracing, lowering, verification."""

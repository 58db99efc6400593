"""Which way each step of a Program goes."""

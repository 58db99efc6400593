"""Options, errors and small tables that every package may use."""

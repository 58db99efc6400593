"""Options, errors and small tables that every room may use."""

"""How each step of a Program runs."""

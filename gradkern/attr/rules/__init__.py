"""Methods that replace each step's derivative by a rule."""

"""A chain of stages in one file: read and checked (read), compared with what is done (state), run (work), reported (report)."""

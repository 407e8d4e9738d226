"""One file a command: its options, ``run(options)`` and, where the common forms do not do, ``render(result, console)``."""

"""What a run takes before it is paid for: memory, time, money, reading, and whether a finished run kept to it."""

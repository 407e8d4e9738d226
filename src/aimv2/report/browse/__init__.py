"""`aimv2 data browse`: a run's samples as its model will see them, before it starts."""

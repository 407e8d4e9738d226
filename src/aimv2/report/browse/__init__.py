"""`aimv2 data browse`: a page of a run's training samples as its model will receive them, before it starts."""

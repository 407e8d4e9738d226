"""The explorer: one page in the browser that shows what a model has learnt, served from this machine to this machine."""

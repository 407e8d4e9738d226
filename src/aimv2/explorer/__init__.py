"""The explorer: a local web page that shows a model's features, attention, captions, predictions and text search."""

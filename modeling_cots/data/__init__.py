"""Pairs of images or videos with captions: opening, reading, augmenting, masking, batching, cached image tokens."""

"""Figures: which image patches a word responds to, and how the momentum similarity scores are distributed."""

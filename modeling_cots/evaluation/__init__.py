"""Embedding a data set of pairs and measuring retrieval in both directions."""

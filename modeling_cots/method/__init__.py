"""The method of the paper: losses, momentum encoders, paired queues, adaptive momentum filter, image tokenizer."""

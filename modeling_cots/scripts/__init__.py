"""The installed programs, and what they share with the scripts of `examples/`: options, steps, parts, the cost."""

"""What the scripts of `examples/` share: options, steps, building a model, the cost of a training run."""

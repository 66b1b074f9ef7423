"""The training loop: the objective, the trainer, checkpoints and recovery, logs."""

"""The training loop and what it needs: configuration, optimizers, schedules, checkpoints, logging."""

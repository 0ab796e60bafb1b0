"""What the notebooks share: models, tasks, the training loop, figures. No method lives here."""

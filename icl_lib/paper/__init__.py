"""What the book and the papers' experiments need: tasks, training, sweeps, data, figures, the trained model."""

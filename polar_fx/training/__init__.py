"""Training of what predicts programs, from what searches found."""

"""Films: from a prompt script to the files of a sampled film. Imports moc, models and data; only commands import it."""

"""Makes the files of a sampled film from a prompt script. Imports moc, models and data; only commands import it."""

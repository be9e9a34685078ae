"""This package makes the files of a sampled film from a prompt script. It imports moc, models and data; only commands
import it."""

"""Evaluation: what is measured of data and models. Imports moc, models and data; only commands import it."""

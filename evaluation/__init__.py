"""This package measures data and models. It imports moc, models and data; only commands import it."""

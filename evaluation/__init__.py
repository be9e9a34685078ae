"""This package measures data and models. It imports moc, models, data and film; only commands import it."""

"""Video and image files are decoded to exact frames, resized and written here."""

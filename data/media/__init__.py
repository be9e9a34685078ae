"""Video and image files: decoded to exact frames, resized, written."""

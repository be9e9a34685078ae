"""This package finds what a path holds, opens checkpoints strictly, and writes them in other forms."""

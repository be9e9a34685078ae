"""Here checkpoints are found in what a path holds, opened strictly, and written in other forms."""

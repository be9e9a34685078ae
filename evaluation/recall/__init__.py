"""This package tests whether a model remembers looks that an earlier shot showed, in the recall world."""

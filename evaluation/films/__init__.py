"""This package judges films: what they show, scores of one and of many, the page that compares them."""

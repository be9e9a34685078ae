"""This package loads packed batches from prepared caches, in an order that does not depend on the number of ranks."""

"""Loading: from prepared caches to packed batches, in one order whatever the ranks."""

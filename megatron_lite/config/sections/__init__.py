"""The keys, by subject. A new key is a new field."""

"""Small shared helpers: files, shards, locks, devices and processes."""

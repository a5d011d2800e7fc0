"""Single-device models, one file a family."""

"""The formats of a checkpoint's folder. Each module has `is_one` (of its format), `read` and `write`."""

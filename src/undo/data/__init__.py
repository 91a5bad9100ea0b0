"""Packed documents on disk, mixed by role into batches."""

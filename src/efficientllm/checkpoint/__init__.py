"""Snapshots on disk and models for others: nothing is ever half-written under its final name."""

"""What the command line starts: a run on a folder, resumable at any moment."""

"""Tools of the repository, not of the pack: set-up, the real host as a subprocess, the demo."""

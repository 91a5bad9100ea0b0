"""One run: its directory on disk, the process that executes it, its ranks, and its tracker."""

"""From YAML files to planned runs, checked jobs, and the command line."""

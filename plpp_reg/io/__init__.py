"""Files and folders: whole or not there, one process at a time, nothing in them run."""

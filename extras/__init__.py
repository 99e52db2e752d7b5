"""What goes further, one file each, run as `python -m extras.NAME`; all of it stands on the core, which knows none of it."""

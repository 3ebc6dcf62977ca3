"""The command line `maisi-ct`, one file a command."""

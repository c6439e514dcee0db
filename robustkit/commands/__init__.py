"""What the words of the command line do: a file for each command."""
